"""The command ``qedfuse``: run an action; report a failure as one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

import qedfuse
from qedfuse.cli.descriptorlimit import explain_descriptor_limit
from qedfuse.cli.dispositions import sigint_raises
from qedfuse.cli.qedfuse.arguments import (
    Arguments,
    parse_arguments,
    parse_mount_helper_arguments,
    parse_stats_arguments,
    parse_umount_arguments,
)
from qedfuse.cli.qedfuse.commands import BUG, INTERRUPTED, mount, stats, umount
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.cli.streams import discard_unwritten, open_streams, writing_stdout
from qedfuse.cli.workingdirectory import REMOVED, is_caused_by_removal
from qedfuse.errors import HostError, QedError
from qedfuse.text import printable, without_queries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_MOUNT_HELPER_NAMES: Final = ("mount.qedfuse", "mount.fuse.qedfuse")
"""The names of the links by which mount(8) runs this command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Without ``argv`` the function takes the arguments of this process, and sets up its standard
    streams and its SIGINT handler.

    Raises:
        Exception: An exception that is not a `QedError` was raised, and ``-d`` was given.
    """
    program, *words = sys.argv if argv is None else ["qedfuse", *argv]
    is_mount_helper = os.path.basename(program) in _MOUNT_HELPER_NAMES  # noqa: PTH119
    is_subcommand = bool(words) and words[0] in _COMMANDS and not is_mount_helper
    debug = False
    if argv is None:
        open_streams()
    try:
        if argv is None:
            sigint_raises()
        if is_subcommand:
            return _COMMANDS[words[0]](words[1:])
        parse = parse_mount_helper_arguments if is_mount_helper else parse_arguments
        arguments = parse(words)
        debug = arguments.debug
        return _ACTIONS[arguments.action](arguments)
    except QedError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has closed the pipe, as head(1) does.  This is not a failure.
        discard_unwritten(sys.stdout)
        return 0
    except Exception as error:
        if debug:
            raise
        return _fail_unexpectedly(error, "" if is_subcommand else " (-d shows where)")


def _umount(words: Sequence[str]) -> int:
    """Run ``qedfuse umount``; return the exit code."""
    arguments = parse_umount_arguments(words)
    if arguments.mountpoint is None:
        return _print(USAGE)
    return umount(arguments.mountpoint, arguments.timeout_seconds, _print_message)


def _stats(words: Sequence[str]) -> int:
    """Run ``qedfuse stats``; return the exit code."""
    arguments = parse_stats_arguments(words)
    if arguments.is_help:
        return _print(USAGE)
    return stats(arguments, lambda error: _print_message(str(error)))


def _print(text: str) -> int:
    """Print the help or the version to stdout; return 0."""
    with writing_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _print_message(message: str) -> None:
    """Print a line to stderr, without the queries of URLs, which can contain secrets.

    A failure is ignored, because the exit code reports the outcome as well.
    """
    try:
        sys.stderr.write(f"qedfuse: {without_queries(message)}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _fail(message: str, code: int) -> int:
    """Print why the command failed; return ``code``."""
    _print_message(message)
    return code


def _fail_unexpectedly(error: Exception, hint: str) -> int:
    """Print a line about an exception that is not a `QedError`; return the exit code.

    ``hint`` is added to the report of a bug.
    """
    explanation = explain_descriptor_limit(error)
    if explanation:
        return _fail(explanation, HostError.exit_code)
    if is_caused_by_removal(error):
        return _fail(REMOVED, HostError.exit_code)
    kind = type(error).__name__
    return _fail(f"internal error: {kind}: {printable(str(error))}{hint}", BUG)


_COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = {
    "umount": _umount,
    "stats": _stats,
}
"""The function of each subcommand, which gets the words after the subcommand's name."""
_ACTIONS: Final[Mapping[str, Callable[[Arguments], int]]] = {
    "mount": mount,
    "help": lambda _arguments: _print(USAGE),
    "version": lambda _arguments: _print(f"qedfuse {qedfuse.__version__}\n"),
}
"""The function for each value of `Arguments.action`."""
