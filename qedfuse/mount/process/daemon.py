"""Running the server in the background; the command returns when the disk can be used.

The process forks before there is an event loop or a second thread, because neither survives a fork.
The child mounts and serves, and reports through a pipe when the disk can be used.

If the command fails or is interrupted, the user expects that nothing is mounted.  So the parent
forwards signals to the child, and the child undoes the mount if the parent has ended.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NoReturn

from qedfuse.errors import HostError, QedError
from qedfuse.text import printable, without_queries
from qedfuse.util.descriptors import (
    STANDARD,
    close_descriptors,
    discard_standard_streams,
    open_descriptors,
)
from qedfuse.util.exitstatus import signal_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_READY: Final = b"ready\n"
"""What the child writes to the pipe when the disk can be used."""
_MOUNT_FAILED_EXIT_CODE: Final = 32
"""The exit code of the parent if the child was killed, or ended with 0 and without a report."""
_INTERRUPTED_EXIT_CODE: Final = 130
"""The exit code of the parent if it has forwarded a signal to the child."""
_FORWARDED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that the parent handles while it waits; it forwards the first one as SIGTERM."""


def run_in_background(serve: Callable[[Callable[[], None]], int]) -> int:
    """Run ``serve`` in a child; return in the parent when the child is ready or has ended.

    If the parent gets a signal while it waits, it sends SIGTERM to the child and goes on waiting.
    A second signal has its default action on the parent.

    Args:
        serve: Called in the child with a function that it must call when the disk can be used;
            returns the exit code of the child.  Until that call the child keeps all descriptors.

    Returns:
        The exit code for the caller's process: 0 if the disk can be used, 130 if a signal was
        forwarded, 32 if the child was killed or ended with 0 too early, and otherwise the exit code
        of the child.

    Raises:
        HostError: /proc is not mounted, or the host refuses a process.
        OSError: The host refuses a pipe, for lack of descriptors.
    """
    inherited = open_descriptors() - set(STANDARD)
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    # Signals are blocked until the parent can forward them.  Otherwise a signal would end only the
    # parent, and the child would go on.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
    try:
        child = os.fork()
    except OSError as error:
        close_descriptors((reading, writing))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise HostError.from_os(error, "process in the background", "cannot start") from error
    if child == 0:
        os.close(reading)
        _be_child(serve, writing, mask, inherited)
    os.close(writing)
    try:
        with _forwarded_signals(child, mask):
            return _wait(child, reading)
    except KeyboardInterrupt:
        # Wait until the child has ended or is ready, because its messages must precede the prompt
        # of the shell.
        _read_report(reading)
        return _INTERRUPTED_EXIT_CODE
    finally:
        os.close(reading)


@contextmanager
def _forwarded_signals(child: int, mask: Iterable[int]) -> Iterator[None]:
    """Unblock signals; forward the first one in the ``with`` block, and raise KeyboardInterrupt.

    The child has a session of its own, so the terminal sends signals to the parent only.
    """

    def forward(_number: int, _frame: object) -> None:
        for number in forwarded:
            signal.signal(number, signal.SIG_DFL)
        os.kill(child, signal.SIGTERM)
        raise KeyboardInterrupt

    # A signal that is ignored, such as SIGHUP under nohup(1), stays ignored and is not forwarded.
    forwarded = [
        number for number in _FORWARDED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, forward) for number in forwarded}
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is forward:
                signal.signal(number, handler)


def _be_child(
    serve: Callable[[Callable[[], None]], int],
    writing: int,
    mask: Iterable[int],
    inherited: Iterable[int],
) -> NoReturn:
    """Serve in the child, and exit."""
    code = 70  # for an exception that leaves ``serve``
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # So that the file system of the caller's working directory can be unmounted.
        os.chdir("/")

        def ready() -> None:
            # If the child kept its inherited descriptors, a program that waits for the end of an
            # inherited pipe, or for an inherited lock, would wait as long as the child runs.  They
            # are not closed earlier, because one of them may be what the user has named as a source
            # or as the pid file (/dev/fd/N).
            discard_standard_streams()
            close_descriptors(inherited)
            try:
                os.write(writing, _READY)
            except BrokenPipeError as error:
                msg = "the command that waited for the mount has ended"
                raise QedError(msg) from error
            finally:
                os.close(writing)

        code = serve(ready)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001  the parent prints nothing
        with suppress(OSError, ValueError):
            reason = f"{type(error).__name__}: {without_queries(printable(str(error)))}"
            sys.stderr.write(f"qedfuse: internal error: {reason}\n")
            sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, reading: int) -> int:
    """Wait until the child is ready or has ended; return the exit code for the parent."""
    if _read_report(reading):
        # The disk is mounted, and stays mounted.  So a signal must not end this process with a
        # failure.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
        return 0
    # After waitpid(2) another process may get the pid of the child.  Signals are blocked before, so
    # that none is forwarded to that process.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
    _pid, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        return code  # the child has printed the reason
    how = "ended" if code == 0 else f"was killed by {signal_name(-code)}"
    sys.stderr.write(f"qedfuse: the process in the background {how} before the disk was ready\n")
    return _MOUNT_FAILED_EXIT_CODE


def _read_report(reading: int) -> bool:
    """Wait for the report of the child; return False if the child ends without a report."""
    report = b""
    while part := os.read(reading, len(_READY)):
        report += part
        if report == _READY:
            return True
    return False
