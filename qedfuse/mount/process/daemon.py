"""Running the server in the background; the command succeeds only when the disk can be used.

The process forks before there is an event loop, a thread or a connection to the kernel, because
none of them survives a fork.  The child does all the work and reports through a pipe.  The
parent waits for the report, prints why the child has failed, and exits with its exit code.

If either process ends early, no mount is left that the user does not know of: the parent
forwards signals to the child, and a child whose parent has ended undoes the mount.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qedfuse.errors import QedError
from qedfuse.util.descriptors import (
    STANDARD,
    close_descriptors,
    discard_standard_streams,
    open_descriptors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_READY: Final = b"ready\n"
_MOUNT_FAILED_EXIT_CODE: Final = 32
"""The exit code for a child that ended without a message."""
_INTERRUPTED_EXIT_CODE: Final = 130
_FORWARDED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_in_background(serve: Callable[[Callable[[], None]], int]) -> int:
    """Run ``serve`` in a child; return in the parent when the child is ready or has failed.

    Args:
        serve: Called in the child with a function that it calls when the disk can be used;
            returns the exit code of the child.  What it prints to stderr before it is ready
            is shown to the user.

    Returns:
        The exit code for the caller's process: 0 only if the disk can be used; 130 if a
        signal arrived before, which the child has got as SIGTERM.  A second signal has its
        default action.

    Raises:
        HostError: /proc is not mounted.
    """
    inherited = open_descriptors() - set(STANDARD)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # Signals are blocked until the child is known: otherwise one could end only the parent.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(serve, writing, mask, inherited)
    os.close(writing)
    try:
        with _forwarded_signals(child, mask):
            return _wait(child, reading)
    except KeyboardInterrupt:
        _read_report(reading)  # wait for the end of the child, so that it prints first
        return _INTERRUPTED_EXIT_CODE
    finally:
        os.close(reading)


@contextmanager
def _forwarded_signals(child: int, mask: Iterable[int]) -> Iterator[None]:
    """Unblock signals; the first one is sent to the child and raises KeyboardInterrupt.

    The child has a session of its own, so signals of the terminal do not reach it.
    """

    def forward(_number: int, _frame: object) -> None:
        for number in forwarded:
            signal.signal(number, signal.SIG_DFL)
        os.kill(child, signal.SIGTERM)
        raise KeyboardInterrupt

    # Signals that are ignored stay ignored, such as SIGHUP under nohup(1).
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
) -> None:
    """Serve and exit; never returns, since the caller's code belongs to the parent.

    Args:
        serve: The function of `run_in_background`.
        writing: The end of the pipe for the report.
        mask: The signal mask before the fork, which is restored.
        inherited: The descriptors of the caller, which are closed when the disk can be used.
    """
    code = 70
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # A file system cannot be unmounted while it has a working directory.
        os.chdir("/")

        def ready() -> None:
            # An inherited descriptor may keep a pipe open or hold a lock for which the caller
            # waits.  It is not closed earlier, because a source or the pid file may be named by
            # its descriptor (/dev/fd/N).
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
    finally:
        os._exit(code)


def _wait(child: int, reading: int) -> int:
    """Wait until the child is ready or has ended; return the exit code for the parent."""
    if _read_report(reading):
        return 0
    # After waitpid the pid may be reused, so no signal may be forwarded to it any more.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)
    _pid, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        return code  # the child has printed the reason
    names = [number.name for number in signal.Signals if number == -code]
    how = "ended" if code == 0 else f"was killed by {(*names, f'signal {-code}')[0]}"
    sys.stderr.write(f"qedfuse: the process in the background {how} before the disk was ready\n")
    return _MOUNT_FAILED_EXIT_CODE


def _read_report(reading: int) -> bool:
    """Wait until the child reports that it is ready; return False if it ends before."""
    report = b""
    while part := os.read(reading, len(_READY)):
        report += part
        if report == _READY:
            return True
    return False
