"""The command ``qedimg``: finds the subcommand, and turns every failure into one line."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from textwrap import fill
from typing import TYPE_CHECKING, Final, Protocol, cast

import qedfuse
from qedfuse.cli.qedimg.parsing import Parser
from qedfuse.cli.qedimg.running import Interruption, interruptible
from qedfuse.cli.qedimg.streams import (
    BROKEN_PIPE,
    complain,
    finish_output,
    output_failed,
)
from qedfuse.cli.streams import make_streams
from qedfuse.cli.workingdirectory import REMOVED, asked_for_removed, is_removed
from qedfuse.errors import QedError, UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMANDS: Final[Mapping[str, str]] = {
    "info": "what an image is, and whether anything is wrong with it",
    "check": "look for damage and leaked space; repair both",
    "create": "make a new image, on its own or over a base",
    "map": "which ranges are data, zeros or holes, and where they lie",
    "convert": "copy a disk into another format, or a chain into one image",
    "compare": "whether two disks have the same content",
    "measure": "how much space a QED copy would need",
    "resize": "change the size of the disk",
    "rebase": "give an overlay another base, or none",
    "commit": "write an overlay's data into its base",
    "compact": "make the file as short as it can be",
    "freelist": "show, keep or drop the list of free space in an image",
    "dump": "show the header or a table, entry by entry",
}
"""The subcommands, in the order of ``--help``, and what each is for."""

EXIT_CODES: Final[Mapping[int, str]] = {
    0: "done",
    1: "usage, the host's file system, or any other failure",
    12: "not a usable QED image",
    13: "corrupt",
    14: "unknown features",
    15: "needs a check",
    16: "in use",
    17: "backing file",
    70: "a bug",
    130: "interrupted",
    141: "nobody read the output to its end",
}
"""What most subcommands end with; ``check`` and ``compare`` have qemu-img's codes."""

_FAILED: Final = 1
_FIRST_CODE: Final = 12
"""Codes below it are spoken for by qemu-img's check and compare."""
_BUG: Final = 70
_WIDTH: Final = 78
_INTERRUPTED: Final = 130
_HELP: Final = "qedimg --help"
_HOME: Final = "qedfuse.cli.qedimg"


class Command(Protocol):
    """What the module of a subcommand offers; ``EXIT_CODES`` and ``FAILED`` besides, or not."""

    DESCRIPTION: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the subcommand takes."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; give the exit code."""


def command(name: str) -> Command:
    """Load the module of a subcommand; the others are not needed to run it."""
    return cast("Command", importlib.import_module(f"{_HOME}.{name}"))


def exit_codes(name: str) -> Mapping[int, str]:
    """Tell what a subcommand's exit codes mean."""
    own: Mapping[int, str] | None = getattr(command(name), "EXIT_CODES", None)
    return EXIT_CODES if own is None else own


def make_parser(name: str) -> Parser:
    """Make the parser of one subcommand."""
    module = command(name)
    codes = "; ".join(f"{code} {meaning}" for code, meaning in exit_codes(name).items())
    parser = Parser(
        prog=f"qedimg {name}",
        description="\n\n".join(fill(part, _WIDTH) for part in module.DESCRIPTION.split("\n\n")),
        epilog=f"Example:\n  {module.EXAMPLE}\n\n{fill(f'Exit codes: {codes}.', _WIDTH)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    loudness.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    return parser


def usage() -> str:
    """Give the text of ``qedimg --help``; it fits a screen."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qedimg COMMAND [OPTION...] IMAGE...",
            "",
            *lines,
            "",
            '"qedimg COMMAND --help" tells the rest.  -q, -v: say less, more.  -V: version.',
            "Exit codes: 0 done; 1 failed; 12 not a usable QED image; 13 corrupt; 14 unknown",
            "features; 15 needs a check; 16 in use; 17 backing file; 130 interrupted.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    Without ``argv`` it is the program that runs, and ends after this.
    """
    # numpy's helper threads are for matrices, of which we have none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    own_process = argv is None
    if own_process:
        make_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        with interruptible(last=own_process) as interruption:
            code = _guarded(words, interruption)
    except KeyboardInterrupt:  # it came after the work was done
        code = _INTERRUPTED
    return finish_output(code, _failed(words[0] if words else ""))


def _guarded(words: Sequence[str], interruption: Interruption) -> int:
    """Run the command; every failure becomes one line and an exit code."""
    name = words[0] if words else ""
    try:
        return _run(name, words[1:])
    except BrokenPipeError:
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as caught:  # noqa: BLE001
        # The last resort: one line in place of a traceback.
        error = _reason(caught)
        # A module that was being imported when a signal came may make anything of it.
        if isinstance(error, KeyboardInterrupt) or (
            interruption.came and not isinstance(error, QedError)
        ):
            return _complain("interrupted", _INTERRUPTED)
        return _explain(name, error)


def _run(name: str, words: Sequence[str]) -> int:
    """Find the subcommand and run it."""
    if name == "help" and words and words[0] in COMMANDS:
        name, words = words[0], ["--help"]
    if not name or name in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if name else _FAILED
    if name in ("-V", "--version"):
        sys.stdout.write(f"qedimg {qedfuse.__version__}\n")
        return 0
    if name not in COMMANDS:
        raise UsageError(_unknown(name))
    parser = make_parser(name)
    try:
        arguments = parser.parse(words)
    except SystemExit as end:  # --help has been printed
        return int(end.code or 0)
    from qedfuse.cli.qedimg.log import set_up_logging  # noqa: PLC0415  a quick --help

    set_up_logging(quiet=arguments.quiet, verbose=arguments.verbose)
    return command(name).run(arguments)


def _unknown(name: str) -> str:
    """Say that there is no such subcommand, and which one may have been meant."""
    if name.startswith("-"):
        return f"{printable(name)}: found an option, expected a command before it (see: {_HELP})"
    from difflib import get_close_matches  # noqa: PLC0415  needed by few

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see: {_HELP}"
    return f"{printable(name)}: unknown command ({hint})"


def _reason(error: BaseException) -> BaseException:
    """Give one error for those of several tasks, one of ours if there is any."""
    while isinstance(error, BaseExceptionGroup):
        known = error.subgroup(QedError) or error
        error = known.exceptions[0]
    return error


def _explain(name: str, error: BaseException) -> int:
    """Print one line about a failure; give the exit code."""
    if isinstance(error, QedError):
        code = _code(name, error)
        if error.errno == errno.ENOENT and is_removed():
            return _complain(f"{error} ({REMOVED})", code)
        # Nothing is loaded here: that may be what failed.
        log = sys.modules.get(f"{_HOME}.log")
        said = log is not None and log.was_said(str(error))
        return code if said else _complain(str(error), code)
    if isinstance(error, OSError):
        return _explain_refusal(error, _code(name, error))
    if isinstance(error, MemoryError):
        return _complain("there is not enough memory", _code(name, error))
    if "QEDIMG_TRACEBACK" in os.environ:
        raise error
    what = f"{type(error).__name__}: {error}"
    return _complain(f"internal error: {what} (QEDIMG_TRACEBACK=1 shows where)", _BUG)


def _explain_refusal(error: OSError, code: int) -> int:
    """Print one line about what the host refused; give the exit code."""
    if asked_for_removed(error):
        return _complain(REMOVED, code)
    if error.filename is None:
        return output_failed(error, code)
    return _complain(f"{error.filename}: {error.strerror}", code)


def _code(name: str, error: BaseException) -> int:
    """Choose the exit code for an error."""
    # Nothing is loaded here: that may be what failed.
    module = sys.modules.get(f"{_HOME}.{name}")
    codes: Mapping[int, str] = getattr(module, "EXIT_CODES", EXIT_CODES)
    wanted = error.exit_code if isinstance(error, QedError) else _FAILED
    return wanted if wanted >= _FIRST_CODE and wanted in codes else _failed(name)


def _failed(name: str) -> int:
    """Give the exit code of a subcommand for any failure that has none of its own."""
    failed: int = getattr(sys.modules.get(f"{_HOME}.{name}"), "FAILED", _FAILED)
    return failed


def _complain(message: str, code: int) -> int:
    """Print why it failed, on one line; give the exit code."""
    complain(message)
    return code
