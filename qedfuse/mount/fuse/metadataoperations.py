"""Requests about metadata: names, attributes, the size of a disk, and the directory."""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, NoReturn

import pyfuse3
from pyfuse3 import FUSEError

from qedfuse.errors import QedError
from qedfuse.mount.fuse.attributes import Attributes, set_times
from qedfuse.mount.fuse.handles import HANDLE_FLAGS
from qedfuse.mount.fuse.requesterrors import RequestErrors, answered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyfuse3 import (
        EntryAttributes,
        ReaddirToken,
        RequestContext,
        SetattrFields,
        StatvfsData,
    )

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
    from qedfuse.mount.fuse.partitionfiles import PartitionFiles
    from qedfuse.mount.fuse.sizefixup import SizeFixup
    from qedfuse.mount.fuse.truncation import Truncation
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


class MetadataOperations(pyfuse3.Operations):
    """The handlers of requests about metadata, for one mount.

    Requests for extended attributes have no handler, so pyfuse3 answers the first one with ENOSYS,
    and the kernel sends no further ones.  After any other reply it would send one with each
    write(2).

    Attributes:
        disks: The disks, by inode number.
        debug: Whether every request is logged.
        errors: Converts the exceptions of handlers to errno values, and logs them.
        growable: Whether writes past the end, fallocate(2) and truncate(2) enlarge a disk.
    """

    supports_dot_lookup = False

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
        """Export the disks as files of a directory, or a single disk as the mountpoint itself.

        Args:
            disks: The disks.
            options: The options of the mount.
            truncation: Changes the size of a disk.
            size_fixup: Gets a request when the kernel may have cached a wrong size of a disk.
            partition_files: Keeps the files of partitions in step with the disks.
            is_directory: Whether the mountpoint is a directory, not the file of the only disk.
        """
        super().__init__()
        self.disks = disks.by_inode
        self.debug = _log.isEnabledFor(logging.DEBUG)
        self.errors = RequestErrors(disks.by_inode)
        self.growable = options.growable
        self._exported_disks = disks
        self._truncation = truncation
        self._size_fixup = size_fixup
        self._partition_files = partition_files
        self._is_directory = is_directory
        self._attributes = Attributes(options)
        # The kernel does not know ``allow_root`` and gets ``allow_other`` in its place, so the
        # handlers refuse other users (`admit`).
        is_limited = options.allow_root and not options.allow_other
        self._admitted = frozenset((0, os.getuid())) if is_limited else None

    def admit(self, uid: int) -> None:
        """Refuse a user whom the options exclude from the mount.

        Raises:
            FUSEError: EACCES, the option ``allow_root`` is set without ``allow_other``, and the
                user is neither root nor the user who mounts.
        """
        if self._admitted is not None and uid not in self._admitted:
            raise FUSEError(errno.EACCES)

    def disk_of(self, inode: int) -> ExportedDisk:
        """Return the disk of an inode number, or of a file handle (an inode number with flags).

        Raises:
            FUSEError: EISDIR, the inode is that of the directory; ENOENT, no disk has the inode;
                ESTALE, the inode was that of a partition that has changed since, so the kernel
                looks up the name again.
        """
        exported = self.disks.get(inode & ~HANDLE_FLAGS)
        if exported is None:
            if self._is_root(inode):
                raise FUSEError(errno.EISDIR)
            is_removed = self._exported_disks.was_removed(inode & ~HANDLE_FLAGS)
            raise FUSEError(errno.ESTALE if is_removed else errno.ENOENT)
        return exported

    async def refresh_partitions(self, inode: int) -> None:
        """Bring the partitions of the disk that has the file ``inode`` up to date.

        Afterwards `disk_of` raises ESTALE if the file was that of a partition that has changed.
        Do nothing if no disk has the inode.
        """
        exported = self.disks.get(inode)
        if exported is not None:
            await self._partition_files.refresh_disk(exported)

    def may_grow(self, exported: ExportedDisk) -> bool:
        """Return whether requests may enlarge a disk; False for a partition, of fixed size."""
        return self.growable and not exported.is_partition

    async def grow(self, exported: ExportedDisk, end: int) -> None:
        """Grow a disk to ``end`` bytes, rounded up to whole sectors.

        Raises:
            FUSEError: As in `Truncation.grow`.
            QedError: As in `Truncation.grow`.
        """
        await self._truncation.grow(exported, end)

    def _is_root(self, inode: int) -> bool:
        """Return whether an inode is that of the directory; False if the mountpoint is a file."""
        return self._is_directory and inode == pyfuse3.ROOT_INODE

    # Names and attributes

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Return the attributes of the disk that has the name ``name`` in the directory.

        For the names ``.`` and ``..`` the attributes are those of the directory.

        Raises:
            FUSEError: ENOTDIR, the parent is no directory; ENOENT, no disk has the name; EACCES,
                as in `admit`.
        """
        self.admit(ctx.uid)
        if not self._is_root(parent_inode):
            raise FUSEError(errno.ENOTDIR)
        if name in (b".", b".."):
            return self._attributes.of_root(self._exported_disks)
        await self._partition_files.refresh_name(name)
        exported = self._exported_disks.by_name.get(name)
        if exported is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes.for_reply(exported)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing, because the kernel does not decide how long a file of the mount exists."""

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Return the attributes of the directory or of a disk.

        Raises:
            FUSEError: ENOENT, no file has the inode; ESTALE, as in `disk_of`; EACCES, as in
                `admit`, unless a handle of the disk is open.
        """
        if self._is_root(inode):
            self.admit(ctx.uid)
            return self._attributes.of_root(self._exported_disks)
        exported = self.disks.get(inode)
        if exported is None or not exported.handles:
            self.admit(ctx.uid)
        # Otherwise a process may have inherited a descriptor from an admitted one, and pyfuse3 does
        # not pass whether the request belongs to a descriptor.  The kernel needs the attributes
        # before a write.
        return self._attributes.for_reply(self.disk_of(inode))

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Set the times or the size of a disk, and return its new attributes.

        Owner and permissions cannot be changed, but a request that sets them to their present
        values succeeds.

        Raises:
            FUSEError: EPERM, the inode is that of the directory, or the request would change the
                owner or the permissions of a disk; EBUSY, the size would change, and a file of the
                mount that shows a part of the same disk is open; ENOENT, no file has the inode;
                ESTALE, as in `disk_of`; EACCES, as in `admit`, for a request without a handle; or
                the errno of an error of `Truncation.set_size`.
        """
        if fh is None:
            # With a handle, `Operations.open` has admitted the user who opened the disk.  The
            # process may have inherited the descriptor: before its fsync the kernel sets the times,
            # and after a failure it would send no FSYNC.
            self.admit(ctx.uid)
        if self._is_root(inode):
            raise FUSEError(errno.EPERM)
        if fields.update_size:
            # The range of an outdated partition may be that of another one now.
            await self.refresh_partitions(inode)
        exported = self.disk_of(inode)
        present = self._attributes.of_disk(exported)
        if (
            (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(present.st_mode))
            or (fields.update_uid and attr.st_uid != present.st_uid)
            or (fields.update_gid and attr.st_gid != present.st_gid)
        ):
            raise FUSEError(errno.EPERM)
        reply_with_real_size = True
        if fields.update_size and attr.st_size != exported.disk.size:
            with self._exported_disks.changing(exported):
                reply_with_real_size = await self._truncation.set_size(exported, attr.st_size)
        if fields.update_atime or fields.update_mtime:
            await set_times(
                exported,
                attr.st_atime_ns if fields.update_atime else present.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else present.st_mtime_ns,
            )
        reply = self._attributes.for_reply(exported)
        if not reply_with_real_size:
            # The reply makes the kernel drop its pages past the requested size, and request the
            # real size later (`qedfuse.mount.fuse.truncation`).
            reply.st_size = attr.st_size
            reply.attr_timeout = 0
            self._size_fixup.request(exported)
        return reply

    # The directory

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open the directory; the handle is the inode number of the directory.

        Raises:
            FUSEError: ENOTDIR, the inode is not that of the directory; EACCES, as in `admit`.
        """
        self.admit(ctx.uid)
        if not self._is_root(inode):
            raise FUSEError(errno.ENOTDIR)
        await self._partition_files.refresh()
        return inode

    @answered
    async def readdir(
        self,
        fh: int,  # noqa: ARG002  an argument that pyfuse3 passes
        start_id: int,
        token: ReaddirToken,
    ) -> None:
        """List the disks after position ``start_id``, until the reply to the kernel is full.

        The position of a disk is its inode number, which does not change if files of partitions
        are added or removed during the listing.
        """
        sent = []
        for exported in self._exported_disks:  # by ascending inode number
            if exported.inode <= start_id:
                continue
            attributes = self._attributes.for_listing(exported)
            if not pyfuse3.readdir_reply(token, exported.name, attributes, exported.inode):
                break
            sent.append((exported, attributes.st_blocks))
        # `ExportedDisk.cached_blocks` must be the value that the kernel has cached.  So it is set
        # at the end, when no exception can replace the reply by an error any more.
        for exported, blocks in sent:
            exported.cached_blocks = blocks

    async def releasedir(self, fh: int) -> None:
        """Do nothing, because the handle of a directory has no state."""

    @answered
    async def fsyncdir(
        self,
        fh: int,  # noqa: ARG002  an argument that pyfuse3 passes
        datasync: bool,  # noqa: ARG002, FBT001  an argument that pyfuse3 passes
    ) -> None:
        """Make all writes so far to all disks durable.

        Raises:
            FUSEError: A disk could not be made durable; the others were flushed nevertheless.
        """
        failure: QedError | None = None
        for exported in self._exported_disks:
            try:
                await exported.disk.flush()
            except QedError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    @answered
    async def statfs(
        self,
        ctx: RequestContext,  # noqa: ARG002  an argument that pyfuse3 passes
    ) -> StatvfsData:
        """Return the size and free space of the file system that stores the first disk's image.

        Raises:
            FUSEError: The errno with which the host refuses the call.
        """
        host = next(iter(self._exported_disks)).disk.statvfs()
        reply = pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail",
            "f_files", "f_ffree", "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(reply, name, getattr(host, name))
        return reply

    async def _refuse(self, *_args: object) -> NoReturn:
        """Refuse to create, remove or rename a file (EPERM)."""
        raise FUSEError(errno.EPERM)

    # One method replaces handlers with different signatures.
    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]
