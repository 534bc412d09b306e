"""The models of the programs: that of qedimg from its parsers, that of qedfuse from its help."""

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
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.cli.qedimg import main as qedimg_main
from qedfuse.mount.optionparser import known_options

_HELP: Final = "show this help message and exit"


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
                exit_codes={} if codes is qedimg_main.EXIT_CODES else codes,
            )
        )
    return Program("qedimg", tuple(commands))


def qedfuse() -> Program:
    """Return the model of ``qedfuse``."""
    source = Operand(Value.named("SOURCE"), repeats=True, help=_operand_help("SOURCE"))
    mountpoint = Operand(Value.named("MOUNTPOINT"), help=_operand_help("MOUNTPOINT"))
    mount = Command("", "show disk images as raw files", _mount_options(), (source, mountpoint))
    umount = Command(
        "umount",
        "unmount, and wait until everything is durable",
        (Option(("--timeout",), "wait no longer than this", Value("SECONDS")),),
        (mountpoint,),
    )
    return Program("qedfuse", (mount, umount))


def option_words() -> list[tuple[str, str]]:
    """List the options of ``qedfuse -o``: the names on each line of the help, and the meaning."""
    found: list[tuple[str, str]] = []
    for line in _paragraphs()[4].splitlines():
        words, _, meaning = line.strip().partition("  ")
        if line.startswith("   "):  # the meaning of the last option continues in this line
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif meaning:
            found.append((words, meaning.strip()))
    return found


def exit_codes() -> list[tuple[int, str]]:
    """List ``qedfuse``'s exit codes with their meaning."""
    text = " ".join(USAGE.split("Exit codes:")[1].split()).rstrip(".")
    return [
        (int(code), meaning) for code, _, meaning in (i.partition(" ") for i in text.split("; "))
    ]


def mount_words() -> dict[str, tuple[str, ...] | None]:
    """List the options of ``-o``: None for one without a value, else its possible values."""
    return dict(sorted(known_options().items()))


def _paragraphs() -> list[str]:
    """Split the help at empty lines."""
    return USAGE.split("\n\n")


def _operand_help(name: str) -> str:
    """Return the description of an operand in the help."""
    text = _paragraphs()[2]
    found = re.search(rf"^{name} +(.*(?:\n +.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _mount_options() -> tuple[Option, ...]:
    """Return the options of a mount, as the help lists them."""
    options = []
    for line in _paragraphs()[3].splitlines():
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
