"""Calling a function that may block in the kernel, with a time limit.

Even SIGKILL may fail to interrupt a system call that waits for the server of a FUSE mount.  In a
worker thread such a call could keep the process from ending.  Therefore the function is called in a
child process, for whose end the caller does not wait when the time is over.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from qedfuse.errors import HostError
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
"""Maximum length of one read(2) from the pipe."""
_MILLISECONDS_PER_SECOND: Final = 1000


class Deadline:
    """A time limit for several calls together, or no limit."""

    def __init__(self, seconds: float | None) -> None:
        """Let the time end ``seconds`` from now; None for no limit."""
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Return the seconds that are left, at least 0; None if there is no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def call_in_child(function: Callable[[], T], seconds: float | None) -> T:
    """Call a function in a child process and return its result.

    The calling process must have only one thread.  A lock that another thread held during the fork
    would stay locked in the child.

    Args:
        function: The function.  Its result and its exceptions must be data that can be pickled.
        seconds: Maximum time to wait for the result, at least 0; None for no limit.

    Raises:
        TimeoutError: The function has not returned in time.  The system call in which the child
            blocks may still take effect.
        Exception: The exception that the function raised, without its traceback.
        HostError: /proc is not mounted, or no pipe or no child process can be made.  Or the child
            has ended without a result, for example because it was killed.
    """
    deadline = Deadline(seconds)
    reading, writing, child = _fork()
    if child == 0:
        _run(function, writing)
    os.close(writing)
    try:
        reply = _receive(reading, deadline)
    except BaseException:
        # The parent does not wait for the child, because a child that blocks in the kernel ends
        # only when the server of the mount answers.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
    with contextlib.suppress(ChildProcessError):  # the program ignores SIGCHLD
        os.waitpid(child, 0)
    if not reply:
        msg = "child process: ended without a result, perhaps because it was killed"
        raise HostError(msg)
    # `_run` has replied with the class, the arguments and the attributes of an exception, or with
    # None, the result and an empty dictionary.
    error_class, value, attributes = pickle.loads(reply)  # noqa: S301  from this process's child
    if error_class is None:
        result: T = value
        return result
    error = error_class.__new__(error_class, *value)
    error.__dict__.update(attributes)
    raise error


def _fork() -> tuple[int, int, int]:
    """Make a pipe and a child process; return the pipe's ends and the pid, 0 in the child."""
    try:
        reading, writing = os.pipe()
        try:
            return reading, writing, os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            raise
    except OSError as error:
        raise HostError.from_os(error, "child process", "cannot start") from error


def _run(function: Callable[[], object], writing: int) -> NoReturn:
    """Call a function in the child, write its result or exception to a pipe, and exit.

    A child that blocks in the kernel can outlive its parent, and other processes could wait for a
    pipe or a lock that it keeps.  So the child keeps no descriptors but ``writing`` and the
    standard streams, which become /dev/null.
    """
    try:
        reply: tuple[Any, ...]
        try:
            discard_standard_streams()
            close_descriptors(open_descriptors() - {*STANDARD, writing})
            reply = (None, function(), {})
        except Exception as error:  # noqa: BLE001  the parent raises the exception again
            reply = (type(error), error.args, error.__dict__)
        with open(writing, "wb") as pipe:
            pipe.write(pickle.dumps(reply))
    finally:
        os._exit(0)


def _receive(reading: int, deadline: Deadline) -> bytes:
    """Read a pipe up to its end and return the content; raise TimeoutError if that takes too long.

    The content is empty if nothing was written.
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
