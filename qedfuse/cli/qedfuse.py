"""The command ``qedfuse``, also in the part of a helper of mount(8)."""

from __future__ import annotations

import getopt
import logging
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import qedfuse
from qedfuse.cli.starting import interruptible
from qedfuse.cli.streams import forget, make_streams
from qedfuse.cli.workingdirectory import REMOVED, asked_for_removed
from qedfuse.errors import HostError, QedError, UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

USAGE: Final = """\
usage: qedfuse SOURCE... MOUNTPOINT [OPTION...]
       qedfuse umount MOUNTPOINT [--timeout SECONDS]

Show QED disk images as flat raw files.

SOURCE      a QED image, or a directory: every QED image in it
MOUNTPOINT  a directory, where vm.qed becomes vm.raw and any other NAME becomes
            NAME.raw; or, for one image, a file that becomes the disk

  -o OPTION[,OPTION...]  see below
  -f, --foreground       stay in front
  -d, --debug            stay in front and show each request
  -r, --read-only        the same as -o ro
  -s                     accepted for libfuse's sake (with mount(8): drop unknown options)
  --pidfile FILE         write the process number there once the disk can be used
  -h, --help             show this
  -V, --version          show the version

  ro, rw                 whether the disk can be written to (rw)
  allow_other            let other users see the mount, as far as uid, gid and umask allow
  allow_root             let root see it, and nobody else
  uid=N, gid=N           owner of the disk (the caller)
  umask=OCTAL            permissions taken from 0666 (077)
  growable               let truncate(1) and writes past the end make the disk larger
  truncate=zero          fill what a program cuts off with zeros, as cp and > do with all of
                         the disk when they open it; it keeps its size (refuse)
  discard, nodiscard     whether discards free space, or only write zeros (discard)
  detect_zeroes=on       take no new space for zeros that are written (off; unmap: and
                         free what they had)
  freelist=on            keep a list of free space in the image between mounts (off);
                         QEMU refuses the image while it has one (as it was)
  compact=full           make the image as short as it can be when the mount ends (auto:
                         as far as a second allows, if the mount changed it; off)
  compact_size=SIZE      how much compact=auto may move (64M)
  compact_time=SECONDS   how long compact=auto may take (1)
  snapshot               drop all writes when the mount ends
  overlay=FILE           send all writes to this QED overlay, made if missing
  backing=confined       use backing files only from the directory of the image that
                         names them (any: from anywhere; none: refuse all)
  backing_dir=DIR        allow backing files from DIR too (may be given again)
  backing_format=raw     what backing files are taken for (or qed), whatever is in them
  force_share            read-only, beside a program that writes to the image
  direct_io              keep nothing in the kernel's cache
  readahead=SIZE         how far the kernel reads ahead (1M; kernel: up to the kernel);
                         only root can have more than the kernel's own
  commit=SECONDS         longest time that changed tables stay in memory (5)
  poll=MICROSECONDS      how long to poll for the next request before sleeping (100; off)
  cache_size=SIZE        memory for tables, for each image (32M)
  nosuid nodev noexec noatime sync dirsync and what else mount(8) brings

"umount" unmounts and returns when everything is durable and the process has ended.
Everything else that can be done to an image is in qedimg (see: qedimg --help).

Exit codes: 0 done; 1 usage; 2 the host's file system or kernel; 12 not a usable QED
image; 13 corrupt; 14 unknown features; 15 needs a check; 16 in use; 17 backing file;
18 mountpoint; 19 privileges; 21 FUSE; 32 any other failure; 70 a bug; 130 interrupted.
"""

_HELPERS: Final = ("mount.qedfuse", "mount.fuse.qedfuse")
_BUG: Final = 70
_INTERRUPTED: Final = 130

_log = logging.getLogger("qedfuse")


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
_HELPER_MEANINGS: Final[Mapping[str, tuple[str, bool]]] = {
    "-f": ("fake", True),
    "-s": ("sloppy", True),
}
_OPTION_WORDS: Final[Mapping[str, str]] = {"-r": "ro", "--read-only": "ro", "-w": "rw"}


@dataclass(slots=True)
class Arguments:
    """What the command line of a mount says.

    Attributes:
        paths: Sources, and the mountpoint as the last.
        options: What stood behind each ``-o``.
        foreground: Stay in front.
        debug: Show each request.
        sloppy: Drop unknown options.
        fake: Do everything but mount.
        pidfile: Where to write the process number.
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


def parse_arguments(words: Sequence[str], *, helper: bool = False) -> Arguments:
    """Read the command line; options may stand anywhere.

    Args:
        words: The words behind the command's name.
        helper: mount(8) runs us: ``-f`` means fake and ``-s`` sloppy.

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
        if helper and name in _HELPER_MEANINGS:
            setattr(found, *_HELPER_MEANINGS[name])
        elif name in _FLAGS:
            for meaning in _FLAGS[name]:
                setattr(found, *meaning)
        elif name in _OPTION_WORDS:
            found.options.append(_OPTION_WORDS[name])
        elif name in ("-o", "--options"):
            found.options.append(value)
        elif name == "--pidfile":
            found.pidfile = value
        # -s without a helper is libfuse's; -n, -v, -N and -t are mount(8)'s, which has one
        # type of us and no table to keep.
    return found


def _getopt(
    words: Sequence[str], short: str, long: list[str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Split options from other words.

    Raises:
        UsageError: A word is unknown or lacks its value.
    """
    try:
        return getopt.gnu_getopt(words, short, long)
    except getopt.GetoptError as error:
        msg = f"{printable(str(error))} (see: qedfuse --help)"
        raise UsageError(msg) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    program, *words = sys.argv if argv is None else ["qedfuse", *argv]
    helper = os.path.basename(program) in _HELPERS  # noqa: PTH119
    debug = False
    if argv is None:
        make_streams()
    try:
        if argv is None:
            interruptible()
        if words and words[0] in _COMMANDS and not helper:
            return _COMMANDS[words[0]](words[1:])
        arguments = parse_arguments(words, helper=helper)
        debug = arguments.debug
        return _ACTIONS[arguments.action](arguments)
    except QedError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        forget(sys.stdout)  # whoever read our output has gone
        return 0
    except Exception as error:  # the last resort: one line in place of a traceback
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print one line about an exception that no error of ours is; give the exit code."""
    if asked_for_removed(error):
        return _complain(REMOVED, HostError.exit_code)
    kind = type(error).__name__
    return _complain(f"internal error: {kind}: {printable(str(error))} (see: -d)", _BUG)


def _print(text: str) -> int:
    """Print what was asked for."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        forget(sys.stdout)
        return _complain(f"standard output: {error.strerror}", HostError.exit_code)
    return 0


def _complain(message: str, code: int) -> int:
    """Print why it failed, on one line; give the exit code."""
    _print_message(message)
    return code


def _print_message(message: str) -> None:
    """Print one line for the user; if nobody listens, the exit code still tells."""
    try:
        sys.stderr.write(f"qedfuse: {message}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _umount(words: Sequence[str]) -> int:
    """Run ``qedfuse umount``."""
    given, paths = _getopt(words, "h", ["timeout=", "help"])
    seconds: float | None = None
    for name, value in given:
        if name in ("-h", "--help"):
            return _print(USAGE)
        seconds = _timeout(value)
    if len(paths) != 1:
        msg = f"umount: found {len(paths)} mountpoints, expected one (see: qedfuse --help)"
        raise UsageError(msg)
    from qedfuse.mount.commands.umount import unmount_and_wait  # noqa: PLC0415  a quick start

    unmount_and_wait(paths[0], seconds, _print_message)
    return 0


def _timeout(value: str) -> float:
    """Read a number of seconds.

    Raises:
        UsageError: It is none.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e6:  # noqa: PLR2004  also refuses what is not a number
        msg = f"option timeout: found {printable(value)}, expected seconds"
        raise UsageError(msg)
    return seconds


def _mount(arguments: Arguments) -> int:
    """Run the mount that the command line describes."""
    from qedfuse.mount.options import (  # noqa: PLC0415
        absolute_words,
        parse_options,
        wants_remount,
    )
    from qedfuse.mount.process.logs import (  # noqa: PLC0415
        log_to,
        log_to_stderr,
        log_to_stderr_without_waiting,
        log_what_nobody_catches,
        system_log,
    )

    if wants_remount(arguments.options):
        return _remount(arguments)
    if len(arguments.paths) < 2:  # noqa: PLR2004  a source and a mountpoint
        msg = "expected SOURCE... and MOUNTPOINT (see: qedfuse --help)"
        raise UsageError(msg)
    options = parse_options(arguments.options, sloppy=arguments.sloppy).absolute()
    log_to_stderr(debug=arguments.debug)

    # Nobody else's working directory is ours later, so names are made absolute now.
    sources = tuple(os.path.abspath(path) for path in arguments.paths[:-1])  # noqa: PTH100
    mountpoint = os.path.realpath(arguments.paths[-1])
    words = absolute_words(arguments.options)
    pidfile = arguments.pidfile and os.path.abspath(arguments.pidfile)  # noqa: PTH100

    def serve(ready: Callable[[], None]) -> int:
        # numpy's helper threads are for matrices, of which we have none; they would spin
        # through the imports and hold a core each.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # Imported in the process that serves: pyfuse3 must not be there before the fork.
        from qedfuse.mount.session import MountRequest, run_session  # noqa: PLC0415

        log_what_nobody_catches()
        request = MountRequest(sources, mountpoint, options, pidfile or None, arguments.fake, words)
        return _guarded(lambda: run_session(request, ready), debug=arguments.debug)

    def ready_in_front() -> None:
        if arguments.debug:  # a user who asked for every request waits for the reader
            _log.debug("ready")
        else:
            log_to_stderr_without_waiting()

    if arguments.foreground or arguments.fake:
        return serve(ready_in_front)

    from qedfuse.mount.process.daemon import run_in_background  # noqa: PLC0415

    def serve_quietly(ready: Callable[[], None]) -> int:
        quiet = system_log()

        def ready_and_quiet() -> None:
            log_to(quiet)
            ready()

        return serve(ready_and_quiet)

    return run_in_background(serve_quietly)


def _remount(arguments: Arguments) -> int:
    """Change the mount that the command line names last; mount(8) names its source too."""
    from qedfuse.mount.commands.remount import remount  # noqa: PLC0415
    from qedfuse.mount.system.mountpoint import resolve_mounted  # noqa: PLC0415  a quick start

    if not arguments.paths:
        msg = "remount: found no mountpoint (see: qedfuse --help)"
        raise UsageError(msg)
    mountpoint = resolve_mounted(arguments.paths[-1])
    remount(mountpoint, arguments.options, fake=arguments.fake, sloppy=arguments.sloppy)
    return 0


def _guarded(session: Callable[[], int], *, debug: bool) -> int:
    """Run a session; a bug in it becomes one line of the log, and a traceback with -d."""
    try:
        return session()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        _log.critical("internal error: %s: %s", type(error).__name__, printable(str(error)),
                      exc_info=error)  # fmt: skip
        return _BUG


_COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = {
    "umount": _umount,
}
_ACTIONS: Final[Mapping[str, Callable[[Arguments], int]]] = {
    "mount": _mount,
    "help": lambda _arguments: _print(USAGE),
    "version": lambda _arguments: _print(f"qedfuse {qedfuse.__version__}\n"),
}
