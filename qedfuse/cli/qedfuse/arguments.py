"""The command line of ``qedfuse``: options and operands, as typed or as mount(8) passes them."""

from __future__ import annotations

import getopt
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.errors import UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FLAGS: Final[Mapping[str, tuple[tuple[str, bool | str], ...]]] = {
    "-f": (("foreground", True),),
    "--foreground": (("foreground", True),),
    "-d": (("debug", True), ("foreground", True)),
    "--debug": (("debug", True), ("foreground", True)),
    "-h": (("action", "help"),),
    "--help": (("action", "help"),),
    "-V": (("action", "version"),),
    "--version": (("action", "version"),),
}
"""The attributes of `Arguments` that each flag sets, with their values."""
_MOUNT_HELPER_FLAGS: Final[Mapping[str, tuple[str, bool]]] = {
    "-f": ("fake", True),
    "-s": ("sloppy", True),
}
"""The attribute that a flag sets, and its value, if mount(8) runs qedfuse as its helper."""
_OPTION_FLAGS: Final[Mapping[str, str]] = {"-r": "ro", "--read-only": "ro", "-w": "rw"}
"""The option of ``-o`` for which each of these flags stands."""

STATS_OUTPUTS: Final = ("human", "json", "prometheus")
"""The values of ``--output`` of ``qedfuse stats``."""

_MAX_TIMEOUT_SECONDS: Final = 1e6
"""Maximum of ``--timeout``, below the 2**31 - 1 milliseconds that poll(2) accepts."""


@dataclass(slots=True)
class Arguments:
    """The parsed command line of a mount.

    Attributes:
        paths: The operands: the sources, then the mountpoint.  Their number is not checked.
        options: The value of each ``-o``, unparsed; ``ro`` or ``rw`` for a flag like ``-r``.
        foreground: Serve in this process instead of a background process.
        debug: Log each request.
        sloppy: Ignore unknown options of ``-o``, as mount(8) demands with ``-s``.
        fake: Check and open the images but do not mount, as mount(8) demands with ``-f``.
        pidfile: The file to which the pid of the server is written; None for no file.
        action: ``mount``, ``help`` or ``version``.
    """

    paths: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    foreground: bool = False
    debug: bool = False
    sloppy: bool = False
    fake: bool = False
    pidfile: str | None = None
    action: str = "mount"


class UmountArguments(NamedTuple):
    """The parsed command line of ``qedfuse umount``.

    Attributes:
        mountpoint: The mount to end; None if ``--help`` was given.
        timeout_seconds: Maximum time to wait until the mount's process has ended; None for no
            limit.
    """

    mountpoint: str | None = None
    timeout_seconds: float | None = None


class StatsArguments(NamedTuple):
    """The parsed command line of ``qedfuse stats``.

    Attributes:
        is_help: Whether ``--help`` was given; the other attributes have no meaning then.
        mountpoint: The mount; None for all mounts of the user, or of all users if root asks.
        output: One of `STATS_OUTPUTS`.
        watch: Whether to print the statistics again every second.
    """

    is_help: bool = False
    mountpoint: str | None = None
    output: str = "human"
    watch: bool = False


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Parse the command line of a mount; options can stand before, between and after operands.

    The values of ``-o`` are not parsed, and the operands are not counted.  ``-f`` means foreground.
    ``-s``, which libfuse has for a single thread, is ignored.

    Raises:
        UsageError: An option or its value is wrong, or an operand or the pid file is empty.
    """
    return _parse(words, "o:fdsrVh", {})


def parse_mount_helper_arguments(words: Sequence[str]) -> Arguments:
    """Parse the command line with which mount(8) runs ``mount.qedfuse``; see `parse_arguments`.

    ``-f`` means fake, and ``-s`` means sloppy.  ``-n``, ``-v`` and ``-t`` are ignored.  ``-N`` is
    refused: mount(8) runs the helper in its own mount namespace, and leaves it to the helper to
    enter the given one.

    Raises:
        UsageError: ``-N`` is given; or see `parse_arguments`.
    """
    return _parse(words, "o:fdsrwnvVhN:t:", _MOUNT_HELPER_FLAGS)


def _parse(
    words: Sequence[str], short_options: str, own_flags: Mapping[str, tuple[str, bool]]
) -> Arguments:
    """Parse the command line of a mount; ``own_flags`` override the flags of `_FLAGS`."""
    given, paths = _getopt(
        words,
        short_options,
        ["foreground", "debug", "read-only", "pidfile=", "help", "version", "options="],
    )
    arguments = Arguments(paths)
    for name, value in given:
        if name in own_flags:
            setattr(arguments, *own_flags[name])
        elif name in _FLAGS:
            for setting in _FLAGS[name]:
                setattr(arguments, *setting)
        elif name in _OPTION_FLAGS:
            arguments.options.append(_OPTION_FLAGS[name])
        elif name in ("-o", "--options"):
            arguments.options.append(value)
        elif name == "--pidfile":
            if not value:  # for example, an unset variable of a script
                msg = "option --pidfile: found '', expected a path (see: qedfuse --help)"
                raise UsageError(msg)
            arguments.pidfile = value
        elif name == "-N":
            msg = (
                "option -N: mounting in another mount namespace is not supported "
                "(nsenter --mount=NAMESPACE mount ... does it)"
            )
            raise UsageError(msg)
    return arguments


def parse_umount_arguments(words: Sequence[str]) -> UmountArguments:
    """Parse the words after ``qedfuse umount``.

    With ``--help`` the values of later options are not checked, nor the number of operands.

    Raises:
        UsageError: An option or its value is wrong, or there is no mountpoint or more than one.
    """
    given, paths = _getopt(words, "h", ["timeout=", "help"])
    timeout_seconds: float | None = None
    for name, value in given:
        if name in ("-h", "--help"):
            return UmountArguments()
        timeout_seconds = _parse_timeout(value)
    if len(paths) != 1:
        msg = f"umount: found {len(paths)} mountpoints, expected one (see: qedfuse --help)"
        raise UsageError(msg)
    return UmountArguments(paths[0], timeout_seconds)


def parse_stats_arguments(words: Sequence[str]) -> StatsArguments:
    """Parse the words after ``qedfuse stats``.

    With ``--help`` the values of later options are not checked, nor the number of operands.

    Raises:
        UsageError: An option or its value is wrong, two options exclude each other, or there is
            more than one mountpoint.
    """
    given, paths = _getopt(words, "h", ["output=", "watch", "help"])
    output, watch = "human", False
    for name, value in given:
        if name in ("-h", "--help"):
            return StatsArguments(is_help=True)
        if name == "--watch":
            watch = True
        elif value in STATS_OUTPUTS:
            output = value
        else:
            msg = (
                f"option --output: found {printable(value)}, expected {' or '.join(STATS_OUTPUTS)}"
            )
            raise UsageError(msg)
    if watch and output == "prometheus":
        msg = "options --watch and --output=prometheus exclude each other"
        raise UsageError(msg)
    if len(paths) > 1:
        msg = f"stats: found {len(paths)} mountpoints, expected at most one (see: qedfuse --help)"
        raise UsageError(msg)
    return StatsArguments(mountpoint=paths[0] if paths else None, output=output, watch=watch)


def _parse_timeout(value: str) -> float:
    """Return the seconds of ``--timeout``; refuse a value that is not permitted."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0  # refused below, because it is out of range
    if not 0 <= seconds <= _MAX_TIMEOUT_SECONDS:  # NaN is refused too
        msg = (
            f"option --timeout: found {printable(value)}, expected 0 to {_MAX_TIMEOUT_SECONDS:.0f} "
            "seconds"
        )
        raise UsageError(msg)
    return seconds


def _getopt(
    words: Sequence[str], short: str, long: list[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the options, each with its value or an empty string, and the operands.

    An empty operand is refused, because it would stand for the working directory.
    """
    try:
        given, operands = _permuting_getopt(words, short, long)
    except getopt.GetoptError as error:
        msg = f"{printable(str(error))} (see: qedfuse --help)"
        raise UsageError(msg) from error
    if "" in operands:
        msg = f"operand {operands.index('') + 1}: found '', expected a path (see: qedfuse --help)"
        raise UsageError(msg)
    return given, operands


def _permuting_getopt(
    words: Sequence[str], short: str, long: list[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the options, each with its value or an empty string, and the operands.

    The result is that of ``getopt.gnu_getopt``, which however takes everything after the first
    operand for an operand if the environment has POSIXLY_CORRECT.  mount(8) passes options last.

    Raises:
        GetoptError: An option is unknown, or lacks its value, or has one that it does not take.
    """
    given: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return given, operands + rest
        if word == "-" or not word.startswith("-"):
            operands.append(word)
            continue
        try:
            given += getopt.getopt([word], short, long)[0]
        except getopt.GetoptError:
            # The value of the option can be the next word.  If the error has another cause, parsing
            # the two words together raises it again.
            given += getopt.getopt([word, *rest[:1]], short, long)[0]
            rest = rest[1:]
    return given, operands
