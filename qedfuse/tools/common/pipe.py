"""Reading and writing pipes and standard streams; a cancellation ends a wait for the other end."""

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
        name: Name of the stream in messages.
    """

    def __init__(self, descriptor: int, name: str, *, blocking: bool) -> None:
        """Take ownership of a descriptor; ``blocking`` means that O_NONBLOCK is not set on it."""
        self._descriptor = descriptor
        self._blocking = blocking
        self.name = name

    async def read(self, view: memoryview) -> int:
        """Wait until bytes are available and read them; return their number, 0 at the end.

        Fewer bytes than the length of ``view`` may be read.

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
        """Write all of a buffer; wait for the reader where necessary.

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
        """Make a system call that transfers bytes; return their number.

        Args:
            call: Makes the system call.
            wait: Waits until the descriptor is ready for the call.
        """
        if self._blocking:
            # O_NONBLOCK would also apply to the processes that share the open file, and they
            # do not expect it.  So the call blocks a thread, which a cancellation abandons.
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
    """Return whether a path is ``-``, a FIFO or a socket; links such as /dev/stdin are followed."""
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def open_stream(path: str, access: int) -> Stream:
    """Open a pipe, or a standard stream if the name is ``-``.

    Args:
        path: Name of the pipe.
        access: ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Raises:
        HostError: The pipe cannot be opened.
    """
    if path == "-":
        return _standard(access)
    try:
        # Opening a FIFO blocks until the other end is opened.  The call is made in a thread
        # that a cancellation abandons, so that the user can interrupt the command.
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
            # The pipe is opened again, because O_NONBLOCK on a second open file does not
            # affect processes that share the first.  A regular file must not be opened
            # again: the second open file would begin at offset 0.
            reopened = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            # For example, the pipe belongs to another user.  The first open file is used.
            pass
        else:
            return Stream(reopened, name, blocking=False)
    return Stream(os.dup(fd), name, blocking=True)
