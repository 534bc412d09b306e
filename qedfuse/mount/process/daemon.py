"""Going to the background, without ever claiming success too early.

The process forks before there is an event loop, a thread or a connection to the kernel:
none of them survives a fork.  The child does everything and reports through a pipe; the
parent waits for that, prints what went wrong, and ends with the child's exit code.

Whichever of the two ends early, no mount is left that nobody knows of: the parent passes
signals on to the child, and a child that finds no parent to report to takes the mount back.
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
_SILENT: Final = 32
"""The exit code for a child that ended without a word: the mount failed."""
_INTERRUPTED: Final = 130
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_in_background(serve: Callable[[Callable[[], None]], int]) -> int:
    """Run ``serve`` in a child; return in the parent when the child is ready or has failed.

    Args:
        serve: Gets a function to call when the disk can be used, and returns an exit
            code when it has ended.  What it prints to stderr before it is ready is seen
            by the user.

    Returns:
        The exit code for the caller's process: 0 only if the disk can be used.  130 if a
        signal came before; the child has been told to end.  A second signal has its default
        action.

    Raises:
        HostError: /proc is not mounted.
    """
    inherited = open_descriptors() - set(STANDARD)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal must find us knowing the child, or it would go on alone.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(serve, writing, mask, inherited)
    os.close(writing)
    try:
        with _forwarded_signals(child, mask):
            return _wait(child, reading)
    except KeyboardInterrupt:
        _read_report(reading)  # until the child has given up, so that it prints before we end
        return _INTERRUPTED
    finally:
        os.close(reading)


@contextmanager
def _forwarded_signals(child: int, mask: Iterable[int]) -> Iterator[None]:
    """Unblock signals; the first ends the child and the body, by KeyboardInterrupt.

    The child has left the terminal's group, so no signal of the terminal reaches it.
    """

    def forward(_number: int, _frame: object) -> None:
        for number in forwarded:
            signal.signal(number, signal.SIG_DFL)
        os.kill(child, signal.SIGTERM)
        raise KeyboardInterrupt

    # What the caller ignores, as nohup(1) does, stays ignored.
    forwarded = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
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

    ``mask`` are the signals that are to be blocked from here on, and ``inherited`` the
    descriptors of the caller.
    """
    code = 70
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # A working directory would keep its file system from being unmounted.
        os.chdir("/")

        def ready() -> None:
            # The caller may wait for the end of a pipe, or for a lock, that this process
            # holds by a descriptor which it knows nothing of.  Until here a source or a pid
            # file may be named by its descriptor.
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
    """Wait until the child is ready or has ended; give the exit code that says which."""
    if _read_report(reading):
        return 0
    # A number that is no process's any more must not get the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    _pid, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        return code  # it has printed the reason itself
    names = [known.name for known in signal.Signals if known == -code]
    how = "ended" if code == 0 else f"was killed by {(*names, f'signal {-code}')[0]}"
    sys.stderr.write(f"qedfuse: the process in the background {how} before the disk was ready\n")
    return _SILENT


def _read_report(reading: int) -> bool:
    """Wait until the child reports that it is ready; return False if it ends before."""
    report = b""
    while part := os.read(reading, len(_READY)):
        report += part
        if report == _READY:
            return True
    return False
