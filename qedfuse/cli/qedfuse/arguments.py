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
"""The attributes of `Arguments` that each flag sets."""
_HELPER_FLAGS: Final[Mapping[str, tuple[str, bool]]] = {
    "-f": ("fake", True),
    "-s": ("sloppy", True),
}
"""Flags that mean something else when mount(8) runs the command."""
_OPTION_FLAGS: Final[Mapping[str, str]] = {"-r": "ro", "--read-only": "ro", "-w": "rw"}
"""Flags that stand for a word of ``-o``."""

_MAX_TIMEOUT_SECONDS: Final = 1e6


@dataclass(slots=True)
class Arguments:
    """The parsed command line of a mount.

    Attributes:
        paths: The sources, then the mountpoint.
        options: The value of each ``-o``, unparsed.
        foreground: Serve in this process instead of a background process.
        debug: Log each request.
        sloppy: Ignore unknown options, as mount(8) does with ``-s``.
        fake: Do everything except the mount itself, as mount(8) does with ``-f``.
        pidfile: The file that gets the process number.
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
    """The parsed command line of ``qedfuse umount``; without a mountpoint it asks for help.

    Attributes:
        mountpoint: The mount to end; None if help was asked for.
        timeout_seconds: How long to wait for its end; None for no limit.
    """

    mountpoint: str | None = None
    timeout_seconds: float | None = None


def parse_arguments(words: Sequence[str], *, helper: bool = False) -> Arguments:
    """Parse the command line of a mount; options may stand anywhere.

    Args:
        words: The words after the command's name.
        helper: Whether mount(8) runs the command as a helper, where ``-f`` means fake and
            ``-s`` means sloppy.

    Raises:
        UsageError: A word is unknown or lacks its value.
    """
    given, paths = _getopt(
        words,
        "o:fdsrwnvVhN:t:" if helper else "o:fdsrVh",
        ["foreground", "debug", "read-only", "pidfile=", "help", "version", "options="],
    )
    found = Arguments(paths)
    for name, value in given:
        if helper and name in _HELPER_FLAGS:
            setattr(found, *_HELPER_FLAGS[name])
        elif name in _FLAGS:
            for setting in _FLAGS[name]:
                setattr(found, *setting)
        elif name in _OPTION_FLAGS:
            found.options.append(_OPTION_FLAGS[name])
        elif name in ("-o", "--options"):
            found.options.append(value)
        elif name == "--pidfile":
            found.pidfile = value
        # The others are accepted and ignored: -s is an option of libfuse's programs, and
        # mount(8) passes -n, -v, -N and -t, of which a helper needs none.
    return found


def parse_umount_arguments(words: Sequence[str]) -> UmountArguments:
    """Parse the words after ``qedfuse umount``.

    Raises:
        UsageError: A word is unknown or lacks its value, or the number of mountpoints is
            not one.
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


def _parse_timeout(value: str) -> float:
    """Parse a number of seconds.

    Raises:
        UsageError: It is no number, or out of range.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_TIMEOUT_SECONDS:  # NaN fails both comparisons
        msg = f"option timeout: found {printable(value)}, expected seconds"
        raise UsageError(msg)
    return seconds


def _getopt(
    words: Sequence[str], short: str, long: list[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Separate the options, with their values, from the operands.

    Raises:
        UsageError: A word is unknown or lacks its value.
    """
    try:
        return getopt.gnu_getopt(words, short, long)
    except getopt.GetoptError as error:
        msg = f"{printable(str(error))} (see: qedfuse --help)"
        raise UsageError(msg) from error
