"""The command ``qedimg``: run a subcommand; report every failure as a line and an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from textwrap import fill
from typing import TYPE_CHECKING, Final, Protocol, cast

import qedfuse
from qedfuse.cli.descriptorlimit import explain_descriptor_limit
from qedfuse.cli.qedimg.output import (
    BROKEN_PIPE,
    finish_output,
    output_failed,
    print_error,
)
from qedfuse.cli.qedimg.parser import Parser
from qedfuse.cli.qedimg.running import Interruption, interruptible
from qedfuse.cli.streams import open_streams
from qedfuse.cli.workingdirectory import REMOVED, is_caused_by_removal, is_removed
from qedfuse.errors import QedError, UsageError
from qedfuse.text import printable
from qedfuse.util.garbagecollector import collect_as_usual

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMMANDS: Final[Mapping[str, str]] = {
    "info": "describe an image, and report what is wrong with it",
    "check": "find damage and leaked space; repair both",
    "create": "create an image, standalone or over a base",
    "map": "list data, zeros and holes, and where they are stored",
    "convert": "copy a disk into another format, or a chain into one image",
    "compare": "compare the content of two disks",
    "measure": "compute how much space a copy of a disk would need",
    "publish": "copy an image to an object store, for any number of machines",
    "warm": "fetch a remote image into the cache before it is needed",
    "resize": "change the size of the disk",
    "rebase": "give an overlay another base, or none",
    "commit": "write an overlay's data into its base",
    "compact": "make the file as short as possible",
    "freelist": "show, write or drop the list of free clusters in an image",
    "dump": "show the header or a table, entry by entry",
}
"""The summary of each subcommand, in the order of ``--help``."""

EXIT_CODES: Final[Mapping[int, str]] = {
    0: "done",
    1: "usage, the host's file system, or any other failure",
    12: "not a usable QED image",
    13: "corrupt",
    14: "unknown features",
    15: "needs a check",
    16: "in use",
    17: "backing file",
    22: "a server cannot be reached, or does not serve the file",
    23: "the file on the server has changed",
    25: "QEMU cannot read the image, or is missing",
    26: "the server has no such file",
    27: "the server refuses access",
    70: "a bug",
    130: "interrupted",
    141: "the reader of the output closed it early",
}
"""The exit codes of most subcommands; ``check`` and ``compare`` have qemu-img's codes."""

_FAILED: Final = 1
"""The exit code for a failure that has no code of its own, as in qemu-img."""
_MIN_OWN_CODE: Final = 12
"""The lowest `QedError.exit_code` that qedimg uses; lower codes mean something else in qemu-img."""
_BUG: Final = 70
"""The exit code for a bug: any exception but QedError, OSError, MemoryError, KeyboardInterrupt."""
_INTERRUPTED: Final = 130
"""The exit code after a signal, as a shell shows it for Ctrl-C (128 + SIGINT)."""
_HELP_COLUMNS: Final = 78
_SEE_HELP: Final = "qedimg --help"
_PACKAGE: Final = "qedfuse.cli.qedimg"


class Command(Protocol):
    """The module of a subcommand.

    The module can also define its own ``EXIT_CODES``, in place of the general ones above, and
    ``FAILED``, the exit code for a failure that has no code of its own (by default 1).
    """

    DESCRIPTION: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options and operands."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the subcommand; return its exit code."""


def command(name: str) -> Command:
    """Return the module of a subcommand, imported at the first call."""
    return cast("Command", importlib.import_module(f"{_PACKAGE}.{name}"))


def exit_codes(name: str) -> Mapping[int, str]:
    """Return the meaning of each exit code of a subcommand."""
    own: Mapping[int, str] | None = getattr(command(name), "EXIT_CODES", None)
    return EXIT_CODES if own is None else own


def make_parser(name: str) -> Parser:
    """Return the parser of a subcommand."""
    module = command(name)
    codes = "; ".join(f"{code} {meaning}" for code, meaning in exit_codes(name).items())
    parser = Parser(
        prog=f"qedimg {name}",
        description="\n\n".join(map(_wrapped, module.DESCRIPTION.split("\n\n"))),
        epilog=f"Example:\n  {module.EXAMPLE}\n\n{_wrapped(f'Exit codes: {codes}.')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument("-q", "--quiet", action="store_true", help="print only errors and JSON")
    verbosity.add_argument("-v", "--verbose", action="store_true", help="print what is being done")
    return parser


def _wrapped(text: str) -> str:
    """Return a paragraph in lines that fit the help."""
    return fill(text, _HELP_COLUMNS, break_on_hyphens=False)


def usage() -> str:
    """Return the text of ``qedimg --help``, which fits a terminal of 80 by 24."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qedimg COMMAND [OPTION...] IMAGE...",
            "",
            *lines,
            "",
            '"qedimg COMMAND --help" shows options.  -q: print less, -v: more.  -V: version.',
            "Exit codes: 0 done; 1 failed; 12 not a usable QED image; 13 corrupt; 14 unknown",
            "features; 15 needs a check; 16 in use; 17 backing file; 22 server; 23 changed;",
            "25 QEMU; 26 no such file on a server; 27 access refused; 70 a bug; 130",
            "interrupted; 141 output closed.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Without ``argv`` the function takes the arguments of this process, sets up the standard streams,
    and leaves signals ignored, so the caller must then exit.

    Raises:
        Exception: There is a bug, and QEDIMG_TRACEBACK is set.
    """
    # By default OpenBLAS, which numpy loads, starts a thread per core, and qedimg needs none of
    # them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    own_process = argv is None
    if own_process:
        open_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        with interruptible(ends_process=own_process) as interruption:
            code = _guarded(words, interruption)
    except KeyboardInterrupt:  # a signal arrived before or after `_guarded`
        code = _INTERRUPTED
    return finish_output(code, _failure_code(words[0] if words else ""))


def _guarded(words: Sequence[str], interruption: Interruption) -> int:
    """Run the command and return its exit code; print a line for a failure.

    Raises:
        Exception: There is a bug, and QEDIMG_TRACEBACK is set.
    """
    name = words[0] if words else ""
    try:
        return _run(name, words[1:])
    except BrokenPipeError:
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as caught:  # noqa: BLE001
        error = _first_error(caught)
        # An interrupted import may raise another exception in place of KeyboardInterrupt.  So
        # after a signal every exception but a QedError means "interrupted".
        if isinstance(error, KeyboardInterrupt) or (
            interruption.has_signal and not isinstance(error, QedError)
        ):
            return _fail("interrupted", _INTERRUPTED)
        return _report_failure(name, error)


def _run(name: str, words: Sequence[str]) -> int:
    """Run the subcommand ``name``, or print the help or the version; return the exit code."""
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
    from qedfuse.cli.qedimg.log import set_up_logging  # noqa: PLC0415  imported late: --help must not load it

    set_up_logging(quiet=arguments.quiet, verbose=arguments.verbose)
    run = command(name).run
    collect_as_usual()
    return run(arguments)


def _unknown(name: str) -> str:
    """Return the message for an unknown subcommand, with a similar name if there is one."""
    if name.startswith("-"):
        return f"{printable(name)}: found an option, expected a command first (see: {_SEE_HELP})"
    from difflib import get_close_matches  # noqa: PLC0415  imported late: needed for this error only

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see: {_SEE_HELP}"
    return f"{printable(name)}: unknown command ({hint})"


def _first_error(error: BaseException) -> BaseException:
    """Return ``error``; of an exception group, return a `QedError` in it, or else any error.

    The cancellation of a task, which does not derive from Exception, is the last choice.
    """
    while isinstance(error, BaseExceptionGroup):
        preferred = error.subgroup(QedError) or error.subgroup(Exception) or error
        error = preferred.exceptions[0]
    return error


def _report_failure(name: str, error: BaseException) -> int:
    """Print a line about a failure, unless the log has shown the error; return the exit code.

    A bug is raised again if QEDIMG_TRACEBACK is set.
    """
    if isinstance(error, QedError):
        code = _exit_code(name, error)
        if error.errno == errno.ENOENT and is_removed():
            return _fail(f"{error} ({REMOVED})", code)
        # Do not import the module here, because its import may be what has failed.
        log = sys.modules.get(f"{_PACKAGE}.log")
        logged = log is not None and log.was_logged(error)
        return code if logged else _fail(str(error), code)
    if isinstance(error, OSError):
        return _report_os_error(error, _exit_code(name, error))
    if isinstance(error, MemoryError):
        return _fail("there is not enough memory", _exit_code(name, error))
    if "QEDIMG_TRACEBACK" in os.environ:
        raise error
    what = f"{type(error).__name__}: {error}"
    return _fail(f"internal error: {what} (QEDIMG_TRACEBACK=1 shows where)", _BUG)


def _report_os_error(error: OSError, code: int) -> int:
    """Print a line about a failed system call; return ``code``."""
    if is_caused_by_removal(error):
        return _fail(REMOVED, code)
    if error.filename is None:
        explanation = explain_descriptor_limit(error)
        if explanation:
            return _fail(explanation, code)
        return output_failed(error, code)
    # If the failed call got a descriptor in place of a path, ``filename`` is the descriptor.
    name = error.filename if isinstance(error.filename, (str, bytes)) else str(error.filename)
    return _fail(f"{printable(name)}: {error.strerror}", code)


def _exit_code(name: str, error: BaseException) -> int:
    """Return the error's own code if the subcommand lists it, and otherwise `_failure_code`.

    Codes below `_MIN_OWN_CODE` have another meaning in each subcommand, so they do not count.
    """
    # Do not import the module here, because its import may be what has failed.
    module = sys.modules.get(f"{_PACKAGE}.{name}")
    codes: Mapping[int, str] = getattr(module, "EXIT_CODES", EXIT_CODES)
    wanted = error.exit_code if isinstance(error, QedError) else _FAILED
    return wanted if wanted >= _MIN_OWN_CODE and wanted in codes else _failure_code(name)


def _failure_code(name: str) -> int:
    """Return the exit code of a subcommand for a failure that has no code of its own."""
    failed: int = getattr(sys.modules.get(f"{_PACKAGE}.{name}"), "FAILED", _FAILED)
    return failed


def _fail(message: str, code: int) -> int:
    """Print why the command failed; return ``code``."""
    print_error(message)
    return code
