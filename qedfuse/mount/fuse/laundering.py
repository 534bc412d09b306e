"""Making the kernel write back and drop the pages that it has cached of a range of a disk.

The name is the kernel's: FUSE_NOTIFY_INVAL_INODE (struct fuse_notify_inval_inode_out) drops the
pages of a range, and before a dirty page is dropped the kernel writes it back, by
``launder_folio`` of the file system's address space operations (fuse_launder_folio in
fs/fuse/file.c).  The notification is sent by a helper process, for the reasons given in
`qedfuse.mount.fuse.launderer`.
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
_TO_LAST_PAGE: Final = 0
"""The length of a range that reaches to the last page that the kernel has cached."""

_MAX_DROP_SECONDS: Final = 1.0
_MAX_ARRIVAL_CHECKS: Final = 1000
_ARRIVAL_CHECK_SECONDS: Final = 0.001


class Laundering:
    """The server's connection to the helper process.

    Before `connect` and after `stop`, and without a helper process, nothing can be laundered,
    and the methods return False.
    """

    def __init__(self, process: Launderer | None) -> None:
        """Use the helper process, which has been forked; None if there is none."""
        self._launderer = process
        self._connection = -1
        self._failed = False
        self._lock = trio.Lock()
        self._socket: trio.socket.SocketType | None = None
        self._unread = 0
        self._incoming = select.poll()

    def connect(self, connection: int) -> None:
        """Work on the connection to the kernel with the descriptor ``connection``."""
        self._connection = connection
        self._incoming.register(connection, select.POLLIN)

    async def launder(self, exported: ExportedDisk, start: int = 0, end: int | None = None) -> bool:
        """Have the kernel write back and drop what it has cached of a range.

        Args:
            exported: The disk.
            start: Guest offset.
            end: Guest offset; None for the end of what the kernel has cached, which can lie
                past the end of the disk while the disk is growing.

        Returns:
            Whether all of it has reached the disk.  If not, the range may hold any data.
        """
        length = _TO_LAST_PAGE if end is None else end - start
        async with self._lock:
            number = await self._notify(exported, start, length)
        # ENOENT: the kernel does not know the inode any more, so it has nothing cached.
        return number in {0, errno.ENOENT} and await self._wait_for_writes(exported)

    async def try_drop_pages(self, exported: ExportedDisk) -> bool:
        """Have the kernel drop all pages that it has cached of a disk; give up after a second.

        While the kernel waits for the reply to a truncation, it cannot drop dirty pages.

        Returns:
            False if the kernel has not dropped them in that time, or cannot be asked.  It may
            still drop them later.
        """
        with trio.move_on_after(_MAX_DROP_SECONDS):
            async with self._lock:
                number = await self._notify(exported, 0, _TO_LAST_PAGE, abandon=True)
                return number in {0, errno.ENOENT}
        return False

    async def _notify(
        self, exported: ExportedDisk, start: int, length: int, *, abandon: bool = False
    ) -> int:
        """Have a notification sent to the kernel; return the errno of its write(2), 0 for none.

        Args:
            exported: The disk.
            start: Guest offset of the range.
            length: Bytes of the range.
            abandon: If the task is cancelled, leave the answer of the process for the next
                caller to skip.  Otherwise the process is stopped.
        """
        message = _INVALIDATE.pack(
            *(_INVALIDATE.size, _NOTIFY_INVAL_INODE, 0, exported.inode, start, length)
        )
        if self._launderer is None or self._failed or self._connection < 0:
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
        except trio.ClosedResourceError:  # `stop` was called while this task waited
            return errno.ENOTCONN
        except trio.Cancelled:
            if not abandon:
                self.stop()
            raise
        if len(answer) < launderer.ERROR.size:
            _log.warning("a helper process has failed: holes in disks in use are reported as data")
            self.stop()
            return errno.ENOTCONN
        return int(launderer.ERROR.unpack(answer)[0])

    async def _wait_for_writes(self, exported: ExportedDisk) -> bool:
        """Wait until no write request is on its way to the disk; return False if that lasts.

        Before Linux 6.16 the kernel counts pages whose writeback is in progress as clean, and
        does not wait for them.
        """
        for _ in range(_MAX_ARRIVAL_CHECKS):
            # If no write is in progress and no request is waiting, the kernel has none queued.
            if not exported.writing and not self._incoming.poll(0):
                return True
            await trio.sleep(_ARRIVAL_CHECK_SECONDS)
        return False

    def stop(self) -> None:
        """Have the process end; call it before the connection is closed."""
        self._failed = True
        if self._socket is not None:
            self._socket.close()
        if self._launderer is not None:
            self._launderer.stop()

    def wait(self) -> None:
        """Wait for the end of the process; call it after the connection has been closed."""
        if self._launderer is not None and not self._launderer.wait():
            _log.warning("helper process %d does not end", self._launderer.pid)
