"""Pipes and standard streams with raw content; waiting for them can be cancelled."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, cannot_open

if TYPE_CHECKING:
    from collections.abc import Callable

_STANDARD: Final = {os.O_RDONLY: 0, os.O_WRONLY: 1}
_NAMES: Final = {os.O_RDONLY: "standard input", os.O_WRONLY: "standard output"}


class Stream:
    """An open stream, read or written at its current position.

    Attributes:
        name: Its name in messages.
    """

    def __init__(self, descriptor: int, name: str, *, blocking: bool) -> None:
        """Take ownership of an open file; ``blocking`` says whether calls on it block."""
        self._descriptor = descriptor
        self._blocking = blocking
        self.name = name

    async def read(self, view: memoryview) -> int:
        """Read what is available into a buffer; return its length in bytes, 0 at the end.

        Raises:
            HostError: The host refused.
        """
        try:
            return await self._call(
                lambda: os.readv(self._descriptor, [view]), trio.lowlevel.wait_readable
            )
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error

    async def write(self, view: memoryview) -> None:
        """Write all of a buffer.

        Raises:
            BrokenPipeError: The reading end is closed.
            HostError: The host refused.
        """
        left = view
        try:
            while left:
                part = left
                count = await self._call(
                    lambda part=part: os.write(self._descriptor, part),  # type: ignore[misc]
                    trio.lowlevel.wait_writable,
                )
                left = left[count:]
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise BrokenPipeError from error
            raise HostError.from_os(error, self.name, "write") from error

    async def _call(self, call: Callable[[], int], wait: Callable[[int], object]) -> int:
        """Make a system call that transfers bytes, and wait until it can."""
        if self._blocking:
            # Another process shares the open file and does not expect O_NONBLOCK on it.
            # So a thread blocks, and a cancellation abandons it.
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
        while True:
            try:
                count = call()
            except BlockingIOError:
                await wait(self._descriptor)  # type: ignore[misc]
            else:
                await trio.lowlevel.checkpoint()
                return count

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def is_stream(path: str) -> bool:
    """Return whether a path is a stream: ``-``, a FIFO or a socket, also by way of /dev/stdin."""
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def open_stream(path: str, access: int) -> Stream:
    """Open a pipe, or a standard stream if the name is ``-``.

    Raises:
        HostError: It cannot be opened.
    """
    if path == "-":
        return _standard(access)
    try:
        # Opening a FIFO blocks until the other end is opened.  In a thread that can be
        # abandoned, the user can still interrupt it.
        fd = await trio.to_thread.run_sync(
            os.open, path, access | os.O_CLOEXEC, abandon_on_cancel=True
        )
    except OSError as error:
        raise cannot_open(path, error) from error
    os.set_blocking(fd, False)
    return Stream(fd, path, blocking=False)


def _standard(access: int) -> Stream:
    """Open a standard stream, which may be a pipe, a file or a terminal."""
    fd, name = _STANDARD[access], _NAMES[access]
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            # A second open file can be made nonblocking without affecting processes that
            # share the first.  Only for a pipe: a regular file that is opened again
            # would be written from its beginning.
            again = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # it belongs to another user
            pass
        else:
            return Stream(again, name, blocking=False)
    return Stream(os.dup(fd), name, blocking=True)
