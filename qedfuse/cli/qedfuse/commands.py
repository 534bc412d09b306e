"""The actions of ``qedfuse``: mount, remount and unmount, and print the statistics of mounts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.cli.descriptorlimit import explain_descriptor_limit
from qedfuse.errors import HostError, UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.cli.qedfuse.arguments import Arguments, StatsArguments
    from qedfuse.errors import QedError

BUG: Final = 70
"""The exit code for an exception that only a bug can cause."""
INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, as a shell shows it (128 + SIGINT)."""

_log = logging.getLogger("qedfuse")


def mount(arguments: Arguments) -> int:
    """Mount; or, with ``-o remount``, change the options of a mount.  Return the exit code.

    By default a background process serves the disks, and this function returns when they can be
    used.  With ``arguments.foreground`` it returns when the mount has ended.  With
    ``arguments.fake`` the images are only checked, opened and closed.

    If the mount fails, the serving process logs the error, and its exit code is the result.

    Raises:
        UsageError: An argument is missing, or an option is invalid.
        QedError: A remount failed, the file of credentials cannot be read, /proc is not mounted,
            or the background process cannot be started.
        OSError: The pipe to the background process cannot be created.
        Exception: There is a bug or a lack of descriptors, and ``-d`` was given.
    """
    # Imported in the functions, so that an action loads only what it needs.
    from qedfuse.mount.images.naming import absolute_source  # noqa: PLC0415
    from qedfuse.mount.optionparser import parse_options  # noqa: PLC0415
    from qedfuse.mount.optionsyntax import absolute_options, wants_remount  # noqa: PLC0415
    from qedfuse.mount.process.logs import (  # noqa: PLC0415
        log_to,
        log_to_stderr,
        log_to_stderr_without_waiting,
        log_uncaught,
        system_log,
    )

    if wants_remount(arguments.options):
        return _remount(arguments)
    if len(arguments.paths) < 2:  # noqa: PLR2004  a source and a mountpoint
        msg = "expected SOURCE... and MOUNTPOINT (see: qedfuse --help)"
        raise UsageError(msg)
    options = parse_options(arguments.options, sloppy=arguments.sloppy).absolute()
    options = options.with_credentials()
    log_to_stderr(debug=arguments.debug)

    # The background process changes its working directory, so names become absolute here.
    sources = tuple(absolute_source(path) for path in arguments.paths[:-1])
    mountpoint = os.path.realpath(arguments.paths[-1])
    option_strings = absolute_options(arguments.options)
    pidfile = None if arguments.pidfile is None else str(Path(arguments.pidfile).absolute())

    def serve(ready: Callable[[], None], log: logging.Handler | None = None) -> int:
        """Serve until the mount ends; call ``ready`` when the disks can be used.

        After that call, messages go to ``log``; if it is None, they go to stderr.
        """
        # By default OpenBLAS, which numpy loads, starts a thread per core.  But `run_session` must
        # be called before there is a second thread, so even a value of the user is replaced by 1.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"

        def session() -> int:
            # This import loads numpy, so it must follow the assignment above, and the fork too: a
            # thread that a library of numpy starts would not survive the fork.
            from qedfuse.mount.session import MountRequest, run_session  # noqa: PLC0415

            log_uncaught()
            request = MountRequest(
                *(sources, mountpoint, options, pidfile, arguments.fake, option_strings),
                log=log,
            )
            return run_session(request, ready)

        return _guarded(session, debug=arguments.debug)

    def ready_in_foreground() -> None:
        # With -d the log must contain every request, so the server waits for the reader of stderr.
        # Without -d it drops messages for which it would have to wait.
        if arguments.debug:
            _log.debug("ready")
        else:
            log_to_stderr_without_waiting()

    if arguments.foreground or arguments.fake:
        return serve(ready_in_foreground)

    from qedfuse.mount.process.daemon import run_in_background  # noqa: PLC0415

    def serve_in_background(ready: Callable[[], None]) -> int:
        # Opened before the mount exists, because afterwards the path of the log's socket may lead
        # through the mount.  Until the disks can be used, the user sees messages on stderr.
        handler = system_log()

        def ready_in_background() -> None:
            log_to(handler)
            ready()

        return serve(ready_in_background, handler)

    return run_in_background(serve_in_background)


def _remount(arguments: Arguments) -> int:
    """Change the options of the mount at the last path; return 0."""
    from qedfuse.mount.commands.remount import remount  # noqa: PLC0415
    from qedfuse.mount.system.mountpoint import resolve_mounted  # noqa: PLC0415  imported late: load only what the action needs

    if not arguments.paths:
        msg = "remount: found no mountpoint (see: qedfuse --help)"
        raise UsageError(msg)
    mountpoint = resolve_mounted(arguments.paths[-1])
    remount(mountpoint, arguments.options, fake=arguments.fake, sloppy=arguments.sloppy)
    return 0


def _guarded(session: Callable[[], int], *, debug: bool) -> int:
    """Run a session and return its exit code, or `INTERRUPTED` after Ctrl-C.

    Any other exception means a lack of descriptors or a bug.  Log it and return an exit code; with
    ``debug`` raise it.
    """
    try:
        return session()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        explanation = explain_descriptor_limit(error)
        if explanation:
            _log.critical("%s", explanation)
            return HostError.exit_code
        _log.critical("internal error: %s: %s", type(error).__name__, printable(str(error)),
                      exc_info=error)  # fmt: skip
        return BUG


def umount(mountpoint: str, timeout_seconds: float | None, report: Callable[[str], None]) -> int:
    """Unmount, wait until the mount's process has ended, and return 0.

    Args:
        mountpoint: The mount to end.
        timeout_seconds: The time limit; None for no limit.  With 0 the function unmounts, and fails
            if the process has not ended then.
        report: Called at most once, with a line for the user, if the function waits long.

    Raises:
        QedError: The unmount failed; the process has failed, was killed or has no mount record; or
            the time is over.
    """
    from qedfuse.mount.commands.umount import unmount_and_wait  # noqa: PLC0415  imported late: load only what the action needs

    unmount_and_wait(mountpoint, timeout_seconds, report)
    return 0


def stats(arguments: StatsArguments, report: Callable[[QedError], None]) -> int:
    """Print the statistics of one mount or of all mounts; return the exit code.

    With ``--watch`` only an error or Ctrl-C ends this function.

    Args:
        arguments: The command line.
        report: Called with the error of each mount whose statistics cannot be read, if there are
            several mounts.

    Raises:
        QedError: There is no mount; or the statistics of the given mount, or of the only mount,
            cannot be read.
        BrokenPipeError: The reader of stdout has gone.
        HostError: Stdout cannot be written to for another reason.
    """
    from qedfuse.cli.qedfuse.stats import print_statistics, watch_statistics  # noqa: PLC0415  imported late: load only what the action needs

    run = watch_statistics if arguments.watch else print_statistics
    return run(arguments.mountpoint, arguments.output, report)
