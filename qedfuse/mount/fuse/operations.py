"""Requests about data: open, read, write, flush, fsync and release.

Each handler checks a request, calls a method of the disk, and converts the result.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import FUSEError

from qedfuse.errors import ForeignError, QedError, RemoteError
from qedfuse.mount.fuse.fastrequests import FastRequests
from qedfuse.mount.fuse.handles import HANDLE_DIRECT, HANDLE_FLAGS, HANDLE_SYNC, HANDLE_WRITER
from qedfuse.mount.fuse.metadataoperations import MetadataOperations
from qedfuse.mount.fuse.requestcounters import FLUSH, READ, WRITE
from qedfuse.mount.fuse.requesterrors import answered

if TYPE_CHECKING:
    from pyfuse3 import FileInfo, RequestContext

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
    from qedfuse.mount.fuse.partitionfiles import PartitionFiles
    from qedfuse.mount.fuse.sizefixup import SizeFixup
    from qedfuse.mount.fuse.truncation import Truncation
    from qedfuse.mount.options import MountOptions


class Operations(MetadataOperations):
    """The handlers of all requests for one mount, except fallocate and lseek.

    `DataRequests` answers some reads, writes and fsyncs before pyfuse3 gets them.  pyfuse3 cannot
    receive fallocate and lseek (`qedfuse.mount.fuse.fallocate`).

    Attributes:
        enable_writeback_cache: Whether the kernel may delay writes; pyfuse3 reads this attribute.
        has_page_cache: Whether the kernel caches pages of the disks.  Then a shared memory map can
            change them, and the kernel sends the changes later, with or without the write-back
            cache.
        fast: Answers reads, writes and fsyncs that need not wait.
    """

    def __init__(
        self,
        disks: ExportedDisks,
        options: MountOptions,
        truncation: Truncation,
        size_fixup: SizeFixup,
        partition_files: PartitionFiles,
        *,
        is_directory: bool,
    ) -> None:
        """Serve the disks; the arguments are those of `MetadataOperations`."""
        super().__init__(
            disks, options, truncation, size_fixup, partition_files, is_directory=is_directory
        )
        # For a mountpoint that is a file, the kernel starts with the size 0, and with the
        # write-back cache it would never replace this size.  `qedfuse.mount.fuse.truncation`
        # explains why the write-back cache is off with truncate=zero.
        self.enable_writeback_cache = (
            is_directory
            and not (options.read_only or options.direct_io)
            and options.truncate == "refuse"
        )
        self.fast = FastRequests(disks.by_inode)
        self._read_only = options.read_only
        self._exclusive = not options.force_share
        self.has_page_cache = not options.direct_io
        self._sync = "sync" in options.kernel_flags

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a disk and return its file handle.

        The kernel drops the cached pages of the disk if another program can change the image
        (``force_share``), or if the pages may be stale (`ExportedDisk.is_stale`).

        Raises:
            FUSEError: EBUSY, another file with the same bytes is open, and one of the two handles
                may write; EACCES, the option ``allow_root`` excludes the user; EISDIR, the inode
                is the directory; ENOENT, no file has the inode; ESTALE, as in `disk_of`; EROFS,
                ``flags`` ask to write to a disk that is read-only.
        """
        self.admit(ctx.uid)
        await self.refresh_partitions(inode)
        exported = self.disk_of(inode)
        writer = flags & os.O_ACCMODE != os.O_RDONLY
        if writer and (self._read_only or exported.read_only):
            raise FUSEError(errno.EROFS)
        self._exported_disks.handle_opened(exported, writer=writer)
        try:
            is_current = await self._partition_files.drop_stale_pages(exported)
        except BaseException:
            self._exported_disks.handle_closed(exported, writer=writer)
            raise
        direct = not self.has_page_cache
        # HANDLE_DIRECT marks writes that bypass the kernel's cache.  With ``direct_io`` all
        # writes do, so no handle needs the bit.
        handle = inode | HANDLE_DIRECT if flags & os.O_DIRECT and not direct else inode
        handle |= HANDLE_WRITER if writer else 0
        if direct and writer and (flags & os.O_DSYNC or self._sync):
            # With ``direct_io`` the kernel leaves O_DSYNC, O_SYNC and the mount flag ``sync`` to
            # the server.  Otherwise the kernel sends an fsync after each write(2).
            handle |= HANDLE_SYNC
        return pyfuse3.FileInfo(
            fh=handle,
            direct_io=direct,
            keep_cache=self._exclusive and is_current and not direct,
        )

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return ``size`` bytes from guest offset ``off``; fewer only at the end of the disk.

        If the read would wait, would go past the end, or must be logged, `read_slowly` answers it.

        Raises:
            FUSEError: The read has failed; the errno is that of the error of the disk.
        """
        if not self.debug:
            start = time.perf_counter_ns()
            try:
                content = self.fast.read(fh, off, size)
            except Exception as error:
                self.disk_of(fh).counters.count_error(READ, start)
                raise FUSEError(self.errors.to_errno(fh & ~HANDLE_FLAGS, "read", error)) from error
            if content is not None:
                self.disk_of(fh).counters.count(READ, size, start, is_fast=True)
                # pyfuse3 accepts any buffer, although its type hints say bytes.
                return content  # type: ignore[return-value]
        return await self.read_slowly(fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write ``buf`` at guest offset ``off``; return how many bytes were written.

        The result is less than the length of ``buf`` only at the end of a disk that cannot grow.
        `_write` answers a write that would wait or go past the end, or that must be logged or be
        durable before the reply.

        Raises:
            FUSEError: As in `_write`.
        """
        if not self.debug:
            start = time.perf_counter_ns()
            try:
                is_written = self.fast.write(fh, off, buf)
            except Exception as error:
                exported = self.disk_of(fh)
                self._exported_disks.write_failed(exported)
                exported.counters.count_error(WRITE, start)
                raise FUSEError(self.errors.to_errno(fh & ~HANDLE_FLAGS, "write", error)) from error
            if is_written:
                self.disk_of(fh).counters.count(WRITE, len(buf), start, is_fast=True)
                return len(buf)
        return await self._write(fh, off, buf)

    @answered
    async def read_slowly(self, fh: int, off: int, size: int) -> bytes:
        """Do the work of `read` on the slow path, which may wait."""
        exported = self.disk_of(fh)
        with exported.counters.counted(READ) as request:
            content = await exported.disk.read(off, size)
            request.size = len(content)
        return content  # type: ignore[return-value]

    @answered
    async def _write(self, fh: int, off: int, buf: bytes) -> int:
        """Do the work of `write` on the slow path, which may wait and can grow the disk.

        Raises:
            FUSEError: ENOSPC, the write starts at or past the end of a disk that cannot grow, or
                with `HANDLE_DIRECT` crosses the end (the part before the end is written); EFBIG,
                the tables cannot address the size; otherwise the errno of the disk's error.
        """
        exported = self.disk_of(fh)
        with exported.counters.counted(WRITE, len(buf)):
            return await self._write_counted(exported, fh, off, buf)

    async def _write_counted(self, exported: ExportedDisk, fh: int, off: int, buf: bytes) -> int:
        """Do the work of `_write` on the disk ``exported``."""
        end = off + len(buf)
        exported.slow_writes += 1
        try:
            if end > exported.disk.size:
                await self._prepare_past_end(exported, off, end, direct=bool(fh & HANDLE_DIRECT))
            written = await exported.disk.write(off, buf)
            if fh & HANDLE_SYNC:
                await exported.disk.flush()
        except (RemoteError, ForeignError) as error:
            self._exported_disks.write_failed(exported)
            if self._is_from_cache(fh):
                raise _lost_data(exported, error) from error
            raise
        except Exception:
            self._exported_disks.write_failed(exported)
            raise
        finally:
            exported.slow_writes -= 1
        if written < len(buf) and fh & HANDLE_DIRECT:
            # If the reply were the number of bytes, the kernel would return EIO to a program that
            # uses O_DIRECT.  ENOSPC names the reason.
            raise FUSEError(errno.ENOSPC)
        return written

    def _is_from_cache(self, fh: int) -> bool:
        """Return whether a write with the handle ``fh`` comes from the kernel's cache.

        Then write(2) has reported success, or a memory map has changed the pages.  `HANDLE_WRITER`
        is missing if the extension has cleared it.  Without the extension, two such writes are
        not recognised: with the write-back cache those that the kernel sends with a handle of
        O_DIRECT, and without it those of memory maps.
        """
        return not fh & HANDLE_WRITER or (self.enable_writeback_cache and not fh & HANDLE_DIRECT)

    async def _prepare_past_end(
        self, exported: ExportedDisk, start: int, end: int, *, direct: bool
    ) -> None:
        """Prepare for a write past the end: grow the disk, or note that bytes will be lost.

        With the write-back cache the kernel accepts a write past the end without a request,
        increases the size that it has cached, and sends the write later.  If the disk does not grow
        to this size, the cached size must be corrected.  If it cannot grow at all, also the writer
        must get an error.  For a write that starts at or past the end, the kernel
        reports the error reply.  For a write that starts before the end, the reply is a smaller
        number of bytes, which the kernel ignores.  So ``overrun`` is set, and the next flush or
        fsync of a handle that may write reports the error.

        A ``direct`` write does not come from the kernel's cache, so the program gets the reply.
        """
        is_size_cached = self.enable_writeback_cache and not direct
        if self.may_grow(exported) and exported.disk.writable:
            try:
                await self.grow(exported, end)
            except (QedError, FUSEError):
                if is_size_cached:
                    self._size_fixup.request(exported)
                raise
        elif is_size_cached:
            exported.overrun = exported.overrun or start < exported.disk.size
            self._size_fixup.request(exported)

    @answered
    async def flush(self, fh: int) -> None:
        """Make close(2) fail if delayed writes have failed; nothing is made durable.

        Raises:
            FUSEError: As in `_report_lost_writes`.
        """
        self._report_lost_writes(fh)

    @answered
    async def fsync(
        self,
        fh: int,
        datasync: bool,  # noqa: ARG002, FBT001  an argument that pyfuse3 passes
    ) -> None:
        """Make all writes so far durable; raise an error also if delayed writes have failed.

        Raises:
            FUSEError: The writes could not be made durable, or as in `_report_lost_writes`.
        """
        exported = self.disk_of(fh)
        with exported.counters.counted(FLUSH):
            await exported.disk.flush()
            self._report_lost_writes(fh)

    def _report_lost_writes(self, fh: int) -> None:
        """Raise an error if the disk has failed, or if a delayed write went past its end.

        The kernel itself reports a delayed write for which it got an error reply.  The loss of
        writes past the end is reported only once, to a handle that may write.  The failure of a
        disk is reported every time, to all handles.

        Raises:
            FUSEError: EIO, the disk has failed; ENOSPC, a write went past the end of the disk.
        """
        exported = self.disk_of(fh)
        if exported.disk.failure is not None:
            raise FUSEError(errno.EIO)
        if exported.overrun and fh & HANDLE_WRITER:
            exported.overrun = False
            raise FUSEError(errno.ENOSPC)

    @answered
    async def release(self, fh: int) -> None:
        """Count a handle as closed."""
        self._exported_disks.handle_closed(self.disk_of(fh), writer=bool(fh & HANDLE_WRITER))


def _lost_data(
    exported: ExportedDisk, error: RemoteError | ForeignError
) -> RemoteError | ForeignError:
    """Record that a write from the kernel's cache has failed; return the error for the log.

    write(2) has reported success, and the kernel does not repeat the write.  So the loss is logged
    even if the cause has been logged already.
    """
    exported.has_lost_data = True
    lost = error.prefixed(
        f"{exported.disk.name}: data that a program has written is lost, because the rest of its "
        "cluster cannot be read: "
    )
    lost.is_logged = False
    return lost
