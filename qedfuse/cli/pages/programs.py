"""Models of the command lines of qedimg (from its parsers) and qedfuse (partly from its help)."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.cli.pages.model import (
    Command,
    Operand,
    Option,
    Program,
    Value,
    operands_of,
    options_of,
)
from qedfuse.cli.qedfuse.arguments import STATS_OUTPUTS
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.cli.qedimg import main as qedimg_main
from qedfuse.mount.optionparser import known_options

_HELP: Final = "show this help message and exit"
"""The help of argparse's option ``-h``, which the model of qedimg does not contain."""


def qedimg() -> Program:
    """Return the model of ``qedimg``."""
    commands = []
    for name, summary in qedimg_main.COMMANDS.items():
        module = qedimg_main.command(name)
        parser = qedimg_main.make_parser(name)
        codes = qedimg_main.exit_codes(name)
        commands.append(
            Command(
                name=name,
                summary=summary,
                options=tuple(item for item in options_of(parser) if item.help != _HELP),
                operands=operands_of(parser),
                description=module.DESCRIPTION,
                example=module.EXAMPLE,
                # The man page lists the usual codes once for all commands.
                exit_codes={} if codes is qedimg_main.EXIT_CODES else codes,
            )
        )
    return Program("qedimg", tuple(commands))


def qedfuse() -> Program:
    """Return the model of ``qedfuse``."""
    source = Operand(Value.named("SOURCE"), repeats=True, help=_operand_help("SOURCE"))
    mountpoint = Operand(Value.named("MOUNTPOINT"), help=_operand_help("MOUNTPOINT"))
    mount = Command("", "show disk images as raw files", _options_in_help(), (source, mountpoint))
    umount = Command(
        "umount",
        "unmount, and wait until everything is durable",
        (Option(("--timeout",), "wait at most SECONDS", Value("SECONDS")),),
        (mountpoint,),
    )
    stats = Command(
        "stats",
        "print what mounts do",
        (
            Option(("--output",), "form of the output", Value("FORM", "words", STATS_OUTPUTS)),
            Option(("--watch",), "print again every second, as iostat -x 1 does"),
        ),
        (Operand(mountpoint.value, optional=True, help=mountpoint.help),),
    )
    return Program("qedfuse", (mount, umount, stats))


def mount_option_help() -> list[tuple[str, str]]:
    """Return the entries about ``-o`` in qedfuse's help, each as its options and their meaning.

    An entry can describe several options, such as ``ro, rw``.
    """
    found: list[tuple[str, str]] = []
    for line in _paragraphs()[4].splitlines():  # "Options of -o"
        words, _, meaning = line.strip().partition("  ")
        if line.startswith("   "):  # the meaning of the last entry continues in this line
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif meaning:
            found.append((words, meaning.strip()))
    return found


def exit_codes() -> list[tuple[int, str]]:
    """Return the exit codes of ``qedfuse`` with their meaning, from its help."""
    text = " ".join(USAGE.split("Exit codes:")[1].split()).rstrip(".")
    return [
        (int(code), meaning) for code, _, meaning in (i.partition(" ") for i in text.split("; "))
    ]


def mount_option_values() -> dict[str, tuple[str, ...] | None]:
    """Return the values of each option of ``-o``: None for no value, empty for a free value."""
    return dict(sorted(known_options().items()))


def _paragraphs() -> list[str]:
    """Return the paragraphs of qedfuse's help, which empty lines separate."""
    return USAGE.split("\n\n")


def _operand_help(name: str) -> str:
    """Return the description of an operand in qedfuse's help; empty without one."""
    text = _paragraphs()[2]  # the operands
    found = re.search(rf"^{name} +(.*(?:\n +.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _options_in_help() -> tuple[Option, ...]:
    """Return the options of a mount, in the order of qedfuse's help."""
    options = []
    for line in _paragraphs()[3].splitlines():  # the options
        names, _, meaning = line.strip().partition("  ")
        flags = []
        value = None
        for name in names.split(", "):
            flag, _, what = name.partition(" ")
            flags.append(flag)
            if flag == "-o":
                value = Value(what, "mount-options")
                meaning = "mount options, separated by commas; may be repeated"
            elif what:
                value = Value.named(what)
        options.append(Option(tuple(flags), meaning.strip(), value, repeats="-o" in flags))
    return tuple(options)
