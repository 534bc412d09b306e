"""Calling a function that may block in the kernel, with a time limit.

A system call that waits for the server of a FUSE mount cannot always be interrupted, not
even by SIGKILL, and a process ends only when all its threads have ended.  Therefore the call
is made in a child process, which the caller abandons when the time is over.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from qedfuse.util.descriptors import (
    STANDARD,
    close_descriptors,
    discard_standard_streams,
    open_descriptors,
)

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_READ_BYTES: Final = 1 << 16
_MILLISECONDS_PER_SECOND: Final = 1000


class Deadline:
    """The time at which to give up, or never."""

    def __init__(self, seconds: float | None) -> None:
        """Set the deadline to ``seconds`` from now; None is never."""
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Return the seconds that are left, at least 0; None if there is no deadline."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def call_in_child(function: Callable[[], T], seconds: float | None) -> T:
    """Call a function in a child process and return its result.

    The result is pickled, so it must be plain data.  The calling process must have no
    threads, because it forks.

    Args:
        function: The function.
        seconds: How long to wait for the result; None for as long as it takes.

    Raises:
        TimeoutError: The function has not returned in time.  The child gets SIGKILL; the
            system call in which it blocks may still take effect.
        Exception: The exception that the function raised, without its traceback.
        RuntimeError: The child ended without a result.
    """
    deadline = Deadline(seconds)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run(function, writing)
    os.close(writing)
    try:
        reply = _receive(reading, deadline)
    except BaseException:
        # The child is not waited for: if it blocks in the kernel, it ends only when the
        # server answers.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
    os.waitpid(child, 0)
    if not reply:
        msg = "a child process ended without a result"
        raise RuntimeError(msg)
    kind, value, attributes = pickle.loads(reply)  # noqa: S301  from our own child
    if kind is None:
        result: T = value
        return result
    error = kind.__new__(kind, *value)
    error.__dict__.update(attributes)
    raise error


def _run(function: Callable[[], object], writing: int) -> NoReturn:
    """Call the function, send its result or exception to the pipe ``writing``, and exit.

    A child that blocks in the kernel outlives the caller.  It must not keep open what the
    caller's parent waits for, such as a pipe or a lock, so it closes all other descriptors.
    """
    try:
        reply: tuple[Any, ...]
        try:
            discard_standard_streams()
            close_descriptors(open_descriptors() - {*STANDARD, writing})
            reply = (None, function(), {})
        except Exception as error:  # noqa: BLE001  it is raised again in the parent
            reply = (type(error), error.args, error.__dict__)
        with open(writing, "wb") as pipe:
            pipe.write(pickle.dumps(reply))
    finally:
        os._exit(0)


def _receive(reading: int, deadline: Deadline) -> bytes:
    """Read a pipe up to its end and return the content.

    Raises:
        TimeoutError: The deadline was reached before the end.
    """
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    received = b""
    while True:
        remaining = deadline.remaining()
        if not poll.poll(None if remaining is None else remaining * _MILLISECONDS_PER_SECOND):
            raise TimeoutError
        part = os.read(reading, _READ_BYTES)
        if not part:
            return received
        received += part
