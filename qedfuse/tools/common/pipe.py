"""Reading and writing pipes and standard streams, with calls that can be cancelled."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, cannot_open
from qedfuse.text import printable
from qedfuse.util.threads import open_in_thread, run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

_STANDARD: Final = {os.O_RDONLY: 0, os.O_WRONLY: 1}
_NAMES: Final = {os.O_RDONLY: "standard input", os.O_WRONLY: "standard output"}


class Stream:
    """An open stream, read or written at its current position.

    Attributes:
        name: Name of the stream in messages, as printable text.
    """

    def __init__(self, descriptor: int, name: str, *, blocking: bool) -> None:
        """Take ownership of a descriptor; ``blocking`` means that O_NONBLOCK is not set on it."""
        self._descriptor = descriptor
        self._blocking = blocking
        self.name = name

    async def read(self, view: memoryview) -> int:
        """Wait until bytes are available or the stream ends; read the bytes into ``view``.

        Returns:
            The number of bytes, which may be less than the length of ``view``; 0 at the end of
            the stream.

        Raises:
            HostError: A system call failed.
        """
        try:
            return await self._call(
                lambda: os.readv(self._descriptor, [view]), trio.lowlevel.wait_readable
            )
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error

    async def write(self, view: memoryview) -> None:
        """Write all of a buffer; wait for the reader where necessary.

        Raises:
            BrokenPipeError: The reading end is closed.
            HostError: A system call failed.
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
        """Make a system call that transfers bytes; return the number of bytes.

        ``wait`` waits until the descriptor is ready; it is used only if O_NONBLOCK is set.
        """
        if self._blocking:
            # The call blocks a worker thread, which a cancellation abandons.  Setting O_NONBLOCK
            # would also affect the other processes that share the open file description.
            return await run_in_thread(call, abandon_on_cancel=True)
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
    """Return whether a path is ``-``, a FIFO or a socket; symbolic links are followed.

    Returns False if the file does not exist or cannot be examined.
    """
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def open_stream(path: str, access: int) -> Stream:
    """Open a pipe, or a standard stream if the path is ``-``; the caller must close the result.

    For a FIFO, the function waits until another process has opened the other end.

    Args:
        path: Path of the pipe, or ``-``.
        access: ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Raises:
        HostError: The pipe cannot be opened.
    """
    if path == "-":
        try:
            return _standard(access)
        except OSError as error:
            raise HostError.from_os(error, _NAMES[access], "cannot open") from error
    try:
        # The user can interrupt the command.  A program that opens the other end of a FIFO after
        # that must not find a reader that never reads.
        fd = await open_in_thread(partial(os.open, path, access | os.O_CLOEXEC), os.close)
    except OSError as error:
        raise cannot_open(path, error) from error
    os.set_blocking(fd, False)
    return Stream(fd, printable(path), blocking=False)


def _standard(access: int) -> Stream:
    """Return standard input or output, as a stream with a new descriptor.

    Closing the stream does not close the standard descriptor.
    """
    fd, name = _STANDARD[access], _NAMES[access]
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            # O_NONBLOCK on a new open file description does not affect processes that share the old
            # one.  A regular file must not be opened again, because the new description would begin
            # at offset 0.
            reopened = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            pass  # for example, the pipe belongs to another user
        else:
            return Stream(reopened, name, blocking=False)
    return Stream(os.dup(fd), name, blocking=os.get_blocking(fd))
