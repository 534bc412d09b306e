"""Making the kernel write back and drop its cached pages of a range of a disk.

The kernel drops the pages of a range when it gets the notification FUSE_NOTIFY_INVAL_INODE.  Before
it drops a dirty page, it writes the page back by ``launder_folio`` (fuse_launder_folio in
fs/fuse/file.c), hence the name "laundering".  A helper process, the launderer, sends the
notification, for the reasons in `qedfuse.mount.fuse.launderer`.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import select
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.mount.fuse.launderer import ANSWER

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.fuse.launderer import Launderer

_log = logging.getLogger(__name__)

# linux/fuse.h: struct fuse_out_header and struct fuse_notify_inval_inode_out.
_INVALIDATE: Final = struct.Struct("=IiQQqq")
_NOTIFY_INVAL_INODE: Final = 2
_TO_LAST_PAGE: Final = 0
"""The length in a notification for a range that ends with the last cached page of a file."""

_MAX_DROP_SECONDS: Final = 1.0
"""Maximum time that `Laundering.try_drop_pages` waits for the kernel to drop the pages."""
_MAX_WRITE_CHECKS: Final = 1000
"""Maximum number of checks whether the kernel's writes have ended: for about a second."""
_WRITE_CHECK_SECONDS: Final = 0.001
"""Time between two of these checks."""
_FIRST_WAITING_KERNEL: Final = (6, 16)
"""The first version of Linux in which laundering waits for pages whose writeback is in progress."""


def _kernel_waits() -> bool:
    """Return whether laundering waits for writeback in progress; False if that is not known."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and tuple(map(int, found.groups())) >= _FIRST_WAITING_KERNEL


class Laundering:
    """Makes the kernel write back and drop cached pages, through the launderer.

    `launder` and `try_drop_pages` return False before `connect`, after `stop`, without a launderer,
    and after its failure.
    """

    def __init__(self, launderer: Launderer | None) -> None:
        """Use the launderer, which the caller has forked; None if there is no launderer."""
        self._launderer = launderer
        self._fuse_connection = -1
        self._stopped = False
        self._lock = trio.Lock()
        self._socket: trio.socket.SocketType | None = None
        self._unread_answers = 0  # answers to sent notifications that were not read yet
        self._request_poll = select.poll()
        self._kernel_waits = _kernel_waits()

    def connect(self, fuse_connection: int) -> None:
        """Set the descriptor of the connection to the kernel; from now on pages can be laundered.

        The caller must call `stop` before it closes this descriptor.
        """
        self._fuse_connection = fuse_connection
        self._request_poll.register(fuse_connection, select.POLLIN)

    async def launder(
        self,
        exported: ExportedDisk,
        start: int = 0,
        end: int | None = None,
        *,
        lock_seconds: float = math.inf,
    ) -> bool:
        """Make the kernel write back and drop its cached pages of a range.

        Args:
            exported: The disk.
            start: Guest offset of the range.
            end: Guest offset of the end of the range, more than ``start``; None for the end of the
                last page that the kernel has cached, which can lie past the end of the disk.
            lock_seconds: Maximum time to wait while other pages are laundered.  They may be those
                of another disk, whose host does not answer.

        Returns:
            True if all data that the kernel had cached for the range has reached the disk.  After
            False the caller must not report any part of the range as a hole.
        """
        length = _TO_LAST_PAGE if end is None else end - start
        has_lock = False
        with trio.move_on_after(lock_seconds):
            await self._lock.acquire()
            has_lock = True
        if not has_lock:
            return False
        try:
            error_number = await self._notify(exported, start, length)
        finally:
            self._lock.release()
        # ENOENT means that the kernel does not know the inode, so it has no page of the disk.
        return error_number in {0, errno.ENOENT} and await self._wait_for_writes(exported)

    async def try_drop_pages(self, exported: ExportedDisk) -> bool:
        """Make the kernel drop all its cached pages of a disk; give up after a second.

        The time is limited because the caller may be about to reply to a truncation.  Before this
        reply the kernel cannot drop a dirty page, so the caller and the kernel would wait for each
        other forever.

        Returns:
            True if the kernel has dropped all pages.  After False it may still drop them later.
        """
        with trio.move_on_after(_MAX_DROP_SECONDS):
            async with self._lock:
                error_number = await self._notify(exported, 0, _TO_LAST_PAGE, keep_launderer=True)
                return error_number in {0, errno.ENOENT}
        return False

    async def _notify(
        self, exported: ExportedDisk, start: int, length: int, *, keep_launderer: bool = False
    ) -> int:
        """Let the launderer write one notification to the kernel, and wait for the answer.

        The caller must hold the lock.  If the launderer fails, or the task is cancelled, the
        launderer is stopped.  With ``keep_launderer`` it goes on after a cancellation, and the next
        call ignores the late answer.

        Returns:
            The errno of the launderer's write(2) to the kernel; 0 if the write(2) succeeded;
            ENOTCONN if nothing can be laundered or the launderer has failed.
        """
        message = _INVALIDATE.pack(
            *(_INVALIDATE.size, _NOTIFY_INVAL_INODE, 0, exported.inode, start, length)
        )
        if self._launderer is None or self._stopped or self._fuse_connection < 0:
            return errno.ENOTCONN
        try:
            if self._socket is None:
                # The launderer ignores the byte, but a descriptor cannot be sent without one.
                socket.send_fds(self._launderer.socket, [b"c"], [self._fuse_connection])
                self._socket = trio.socket.from_stdlib_socket(self._launderer.socket)
            while self._unread_answers:
                # The late answer to a notification whose task was cancelled.
                answer = await self._socket.recv(ANSWER.size)
                self._unread_answers -= 1
            await self._socket.send(message)
            self._unread_answers += 1
            answer = await self._socket.recv(ANSWER.size)
            self._unread_answers -= 1
        except OSError as error:
            answer = b""
            _log.debug("launderer: %s", error)
        except trio.ClosedResourceError:  # `stop` was called while this task waited
            return errno.ENOTCONN
        except trio.Cancelled:
            if not keep_launderer:
                self.stop()
            raise
        if len(answer) < ANSWER.size:
            _log.warning(
                "the launderer (a helper process) has failed: lseek(2) reports holes as data in "
                "disks that are open for writing"
            )
            self.stop()
            return errno.ENOTCONN
        return int(ANSWER.unpack(answer)[0])

    async def _wait_for_writes(self, exported: ExportedDisk) -> bool:
        """Wait until the server has carried out the kernel's writes; return False after a second.

        Linux before 6.16 needs this: there, laundering does not wait for pages whose writeback is
        already in progress.  The requests of all disks share one queue, so while programs use other
        disks without a pause, the result is False although there may be no such page.
        """
        if self._kernel_waits:
            return True
        for _ in range(_MAX_WRITE_CHECKS):
            # If the kernel offers no request, and the server has no write in progress, all writes
            # have ended.  On the fast path writes end before another task runs.
            if not exported.slow_writes and not self._request_poll.poll(0):
                return True
            await trio.sleep(_WRITE_CHECK_SECONDS)
        return False

    def stop(self) -> None:
        """Make the launderer end; nothing can be laundered afterwards.

        The caller must call this before it closes the connection to the kernel.  A second call does
        nothing.
        """
        self._stopped = True
        if self._socket is not None:
            self._socket.close()
        if self._launderer is not None:
            self._launderer.stop()

    def wait(self) -> None:
        """Wait for the end of the launderer; log if the launderer has not ended in 5 seconds.

        The caller must first call `stop` and close the connection to the kernel.
        """
        if self._launderer is not None and not self._launderer.wait():
            _log.warning("the launderer (process %d) does not end", self._launderer.pid)
