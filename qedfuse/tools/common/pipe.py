"""Pipes and the standard streams, for raw content: waiting for their other end can be ended."""

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
    """An open stream, read or written from where it is.

    Attributes:
        name: What it is called in messages.
    """

    def __init__(self, descriptor: int, name: str, *, blocking: bool) -> None:
        """Take an open file; tell whether the calls on it wait."""
        self._descriptor = descriptor
        self._blocking = blocking
        self.name = name

    async def read(self, view: memoryview) -> int:
        """Read into a buffer what there is; return how many bytes, 0 at the end.

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
            BrokenPipeError: Nobody reads it any more.
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
        """Call the kernel when it has or takes something."""
        if self._blocking:
            # Somebody else has the stream too, and does not expect it to refuse to wait.
            # So a thread waits, which is left behind when the user does so no longer.
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
        """Close it."""
        os.close(self._descriptor)


def is_stream(path: str) -> bool:
    """Tell whether a name stands for a pipe: ``-``, a FIFO, or /dev/stdin of that kind."""
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
        # Waits for the other end, as every program does that opens a FIFO; but not longer
        # than the user does.
        fd = await trio.to_thread.run_sync(
            os.open, path, access | os.O_CLOEXEC, abandon_on_cancel=True
        )
    except OSError as error:
        raise cannot_open(path, error) from error
    os.set_blocking(fd, False)
    return Stream(fd, path, blocking=False)


def _standard(access: int) -> Stream:
    """Open a standard stream, whatever it is attached to."""
    fd, name = _STANDARD[access], _NAMES[access]
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            # Opened once more it can be told not to wait, and nobody else notices.  A
            # file must not be: it would be written to from its beginning.
            again = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # another user's
            pass
        else:
            return Stream(again, name, blocking=False)
    return Stream(os.dup(fd), name, blocking=True)
