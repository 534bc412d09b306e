"""The man pages qedimg(1) and qedfuse(8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import qedfuse
from qedfuse.cli.pages import programs, prose, roff
from qedfuse.cli.qedimg import main as qedimg_main

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qedfuse.cli.pages.model import Command, Option

_LOUDNESS: Final = ("--quiet", "--verbose")
"""What every command has; it is told once."""


def qedimg_page() -> str:
    """Write qedimg(1)."""
    return _page(_qedimg())


def qedfuse_page() -> str:
    """Write qedfuse(8)."""
    return _page(_qedfuse())


def _page(lines: Iterable[str]) -> str:
    """Join the lines."""
    note = r'.\" Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.'
    return "\n".join((note, *lines)) + "\n"


def _heading(name: str, section: int, summary: str) -> Iterator[str]:
    """Write title and NAME."""
    version = f"qedfuse {qedfuse.__version__}"
    yield f'.TH {name.upper()} {section} {prose.DATE} "{version}"'
    yield from (".nh", ".ad l", ".SH NAME")
    yield rf"{name} \- {roff.plain(summary)}"


def _qedimg() -> Iterator[str]:
    """Write the lines of qedimg(1)."""
    program = programs.qedimg()
    yield from _heading("qedimg", 1, prose.QEDIMG_NAME)
    yield from (".SH SYNOPSIS", r"\fBqedimg\fR \fICOMMAND\fR [\fIOPTION\fR...] \fIIMAGE\fR...")
    yield from (".br", r"\fBqedimg\fR \fB\-\-help\fR | \fB\-\-version\fR")
    yield ".SH DESCRIPTION"
    yield from roff.paragraphs(prose.QEDIMG)
    yield ".PP"
    yield "The commands:"
    for command in program.commands:
        yield from roff.item(roff.bold(command.name), command.summary)
    yield ".SH OPTIONS OF EVERY COMMAND"
    for option in program.commands[0].options:
        if option.flags[-1] in _LOUDNESS:
            yield from _option(option)
    yield from roff.item(_flags(("-h", "--help")), "show help for the command, with an example")
    yield ".SH COMMANDS"
    for command in program.commands:
        yield from _command(command)
    yield ".SH BACKING FILES"
    yield from roff.paragraphs(prose.QEDIMG_BACKING)
    yield ".SH EXIT STATUS"
    yield from _exit_codes(qedimg_main.EXIT_CODES.items())
    yield ".PP"
    own = " and ".join(f"`{command.name}`" for command in program.commands if command.exit_codes)
    yield from roff.sentences(f"What is different for {own} is told there.")
    yield ".SH SIGNALS"
    yield from roff.paragraphs(prose.QEDIMG_SIGNALS)
    yield ".SH ENVIRONMENT"
    for name, meaning in prose.QEDIMG_ENVIRONMENT:
        yield from roff.item(roff.bold(name), meaning)
    yield ".SH SEE ALSO"
    yield from _see_also("qedfuse(8)", "qemu-img(1)")


def _command(command: Command) -> Iterator[str]:
    """Write the section of one of qedimg's commands."""
    yield f".SS {roff.argument(command.name)}"
    operands = " ".join(roff.italic(str(operand)) for operand in command.operands)
    yield rf"{roff.bold(f'qedimg {command.name}')} [\fIOPTION\fR...] {operands}"
    yield ".PP"
    yield from roff.paragraphs(command.description)
    for operand in command.operands:
        if operand.help:
            yield from roff.item(roff.italic(str(operand)), operand.help)
    for option in command.options:
        if option.flags[-1] not in _LOUDNESS:
            yield from _option(option)
    yield from (".PP", "Example:")
    yield from roff.example(command.example)
    if command.exit_codes:
        yield from (".PP", "Exit status:")
        yield from _exit_codes(command.exit_codes.items())


def _qedfuse() -> Iterator[str]:
    """Write the lines of qedfuse(8)."""
    mount, umount = programs.qedfuse().commands
    yield from _heading("qedfuse", 8, prose.QEDFUSE_NAME)
    yield ".SH SYNOPSIS"
    yield r"\fBqedfuse\fR \fISOURCE\fR... \fIMOUNTPOINT\fR [\fIOPTION\fR...]"
    yield from (".br", r"\fBqedfuse umount\fR \fIMOUNTPOINT\fR [\fB\-\-timeout\fR \fISECONDS\fR]")
    yield ".SH DESCRIPTION"
    yield from roff.paragraphs(prose.QEDFUSE)
    for operand in mount.operands:
        yield from roff.item(roff.italic(operand.value.name), operand.help)
    yield ".SH OPTIONS"
    for option in mount.options:
        yield from _option(option)
    yield ".SH MOUNT OPTIONS"
    yield from roff.paragraphs(prose.QEDFUSE_OPTIONS)
    for words, meaning in programs.option_words():
        yield from roff.item(roff.bold(words), meaning)
    kernel = "nosuid, nodev, noexec, noatime, sync, dirsync"
    yield from roff.item(roff.bold(kernel), "as for every mount; see mount(8)")
    yield ".SH UNMOUNTING"
    yield from roff.paragraphs(prose.QEDFUSE_UMOUNT)
    for option in umount.options:
        yield from _option(option)
    yield ".SH MOUNTING BY MOUNT(8) AND FSTAB(5)"
    yield from roff.paragraphs(prose.QEDFUSE_FSTAB)
    yield ".SH EXIT STATUS"
    yield from _exit_codes(programs.exit_codes())
    yield ".SH SIGNALS"
    yield from roff.paragraphs(prose.QEDFUSE_SIGNALS)
    yield ".SH EXAMPLES"
    yield from roff.paragraphs(prose.QEDFUSE_EXAMPLES)
    yield ".SH NOTES"
    yield from roff.paragraphs(prose.QEDFUSE_NOTES)
    yield ".SH SEE ALSO"
    yield from _see_also("fstab(5)", "losetup(8)", "mount(8)", "qedimg(1)", "qemu-img(1)")


def _option(option: Option) -> Iterator[str]:
    """Write what an option does."""
    tag = _flags(option.flags)
    if option.value is not None:
        words = "|".join(option.value.words)
        tag += f" {roff.bold(words) if words else roff.italic(option.value.name)}"
    yield from roff.item(tag, option.help)


def _flags(flags: Iterable[str]) -> str:
    """Write the names of an option."""
    return ", ".join(map(roff.bold, flags))


def _exit_codes(codes: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Write what exit codes mean."""
    for code, meaning in codes:
        yield from roff.item(roff.bold(str(code)), meaning)


def _see_also(*pages: str) -> Iterator[str]:
    """Write the names of other pages."""
    for number, page in enumerate(pages, 1):
        name, _, rest = page.partition("(")
        yield f".BR {roff.plain(name)} ({rest}" + ("," if number < len(pages) else "")
