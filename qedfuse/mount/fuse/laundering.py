"""Having the kernel write back the data of a range that it keeps to itself.

The work is done by another process (`qedfuse.mount.fuse.launderer` says why), which is forked
before the mount exists and ends with the session.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.mount.fuse import launderer

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.fuse.launderer import Launderer

_log = logging.getLogger(__name__)

# linux/fuse.h, a stable interface: struct fuse_out_header and
# struct fuse_notify_inval_inode_out.
_INVALIDATE: Final = struct.Struct("=IiQQqq")
_NOTIFY_INVAL_INODE: Final = 2
"""A length of 0 reaches to the last page that the kernel has."""

_FORGET_SECONDS: Final = 1.0
_TRIES: Final = 1000
_TRY_SECONDS: Final = 0.001


class Laundering:
    """Talks to the process that does the work."""

    def __init__(self, connection: int, process: Launderer | None) -> None:
        """Work on the connection to the kernel with the descriptor ``connection``.

        Without a process nothing can be laundered.
        """
        self._connection = connection
        self._launderer = process
        self._failed = False
        self._turn = trio.Lock()
        self._socket: trio.socket.SocketType | None = None
        self._unread = 0
        self._incoming = select.poll()
        self._incoming.register(connection, select.POLLIN)

    async def launder(self, view: ExportedDisk, start: int, end: int | None = None) -> bool:
        """Have the kernel write back and forget what it caches of a range.

        Args:
            view: The disk.
            start: Guest offset.
            end: Guest offset; None for the end of what the kernel caches, which can lie past
                the end of the disk while the disk is growing.

        Returns:
            Whether all of it has reached the disk.  If not, the range may hold anything.
        """
        length = 0 if end is None else end - start
        message = _INVALIDATE.pack(
            _INVALIDATE.size, _NOTIFY_INVAL_INODE, 0, view.inode, start, length
        )
        async with self._turn:
            number = await self._ask(message)
        # The kernel may not know the inode any more; then it has nothing cached.
        return number in {0, errno.ENOENT} and await self._arrived(view)

    async def launder_all(self, view: ExportedDisk) -> bool:
        """Do the same for a whole disk."""
        return await self.launder(view, 0)

    async def forget_soon(self, view: ExportedDisk) -> bool:
        """Have the kernel drop all pages that it caches of a disk, within about a second.

        Returns:
            False if the kernel did not do so in that time, or cannot be asked.  It can still
            be at it then.  While the kernel waits for the answer to a truncation, it cannot
            drop dirty pages.
        """
        message = _INVALIDATE.pack(_INVALIDATE.size, _NOTIFY_INVAL_INODE, 0, view.inode, 0, 0)
        with trio.move_on_after(_FORGET_SECONDS):
            async with self._turn:
                return await self._ask(message, abandon=True) in {0, errno.ENOENT}
        return False

    async def _ask(self, message: bytes, *, abandon: bool = False) -> int:
        """Have a message passed to the kernel; give the error number that comes back.

        Args:
            message: The message.
            abandon: If the task is cancelled, leave the answer for the next caller to skip.
                Otherwise the process is told to end.
        """
        if self._launderer is None or self._failed:
            return errno.ENOTCONN
        try:
            if self._socket is None:
                socket.send_fds(self._launderer.socket, [b"c"], [self._connection])
                self._socket = trio.socket.from_stdlib_socket(self._launderer.socket)
            while self._unread:
                answer = await self._socket.recv(launderer.ERROR.size)
                self._unread -= 1
            await self._socket.send(message)
            self._unread += 1
            answer = await self._socket.recv(launderer.ERROR.size)
            self._unread -= 1
        except OSError as error:
            answer = b""
            _log.debug("launderer: %s", error)
        except trio.ClosedResourceError:  # the session ends, while somebody still waits
            return errno.ENOTCONN
        except trio.Cancelled:
            if not abandon:
                self.stop()
            raise
        if len(answer) < launderer.ERROR.size:
            _log.warning("a helper process has failed: holes in disks in use are told as data")
            self.stop()
            return errno.ENOTCONN
        return int(launderer.ERROR.unpack(answer)[0])

    async def _arrived(self, view: ExportedDisk) -> bool:
        """Wait until no write is on its way to the disk.

        Before Linux 6.16 pages that the kernel is just writing back count as clean to it,
        and it does not wait for them.
        """
        for _ in range(_TRIES):
            # With none under way and none to fetch, the kernel has none in reserve.
            if not view.writing and not self._incoming.poll(0):
                return True
            await trio.sleep(_TRY_SECONDS)
        return False

    def stop(self) -> None:
        """Tell the process to end, before the connection is closed."""
        self._failed = True
        if self._socket is not None:
            self._socket.close()
        if self._launderer is not None:
            self._launderer.stop()

    def wait(self) -> None:
        """See the process end, after the connection has been closed."""
        if self._launderer is not None and not self._launderer.wait():
            _log.warning("helper process %d does not end", self._launderer.pid)
