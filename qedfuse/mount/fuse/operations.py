"""The protocol with the kernel: each request is checked, becomes one call, and is answered.

What the requests mean for an image is decided below (`qedfuse.disk`); what the file looks
like is decided in `qedfuse.mount.fuse.exporteddisk`.  Extended attributes stay unimplemented on
purpose: any answer but ENOSYS costs each write(2) one more round trip.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from typing import TYPE_CHECKING, Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from qedfuse.errors import QedError
from qedfuse.mount.fuse.errorlog import RequestErrorLog
from qedfuse.mount.fuse.exporteddisk import Attributes, ExportedDisk
from qedfuse.mount.fuse.truncation import Truncation
from qedfuse.ondisk.constants import SECTOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from pyfuse3 import (
        EntryAttributes,
        FileInfo,
        ReaddirToken,
        RequestContext,
        SetattrFields,
        StatvfsData,
    )

    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_DIRECT: Final = 1 << 62
_WRITER: Final = 1 << 61
_SYNCED: Final = 1 << 60
_FLAGS: Final = _DIRECT | _WRITER | _SYNCED
"""The bits of a handle that say O_DIRECT, not O_RDONLY, and that each write is to be durable
when it ends; the rest of it is the inode."""
_INODE: Final = ~(_FLAGS & ~_SYNCED)
"""What `read` and `write` look up: with `_SYNCED` set they find no disk, and wait."""

_ABOUT_NS: Final = 1_000_000_000
"""Nanoseconds by which the times of disk and image may differ."""


def _answered(
    method: Callable[Concatenate[Operations, P], Awaitable[T]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    """Turn whatever a handler raises into an answer for the kernel.

    An exception that reached pyfuse3 would end the mount for all disks and users.
    """

    @functools.wraps(method)
    async def answered(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.debug:
            _log.debug("%s%s", method.__name__, _shown(args))
        try:
            return await method(self, *args, **kwargs)
        except FUSEError as error:
            if self.debug:
                _log.debug("%s: %s", method.__name__, error)
            raise
        except QedError as error:
            self.errors.error(_inode_of(args), error)
            raise FUSEError(error.errno) from error
        except Exception as error:
            self.errors.bug(_inode_of(args), method.__name__.lstrip("_"), error)
            raise FUSEError(errno.EIO) from error

    return answered


def _inode_of(args: Sequence[object]) -> int:
    """Return the inode that a request is about; the root where it names none."""
    first = args[0] if args else None
    return first & ~_FLAGS if isinstance(first, int) else pyfuse3.ROOT_INODE


def _shown(args: Sequence[object]) -> str:
    """Show the arguments of a request; of data, how much there is."""
    return str(
        tuple(f"<{len(arg)} bytes>" if isinstance(arg, bytes) and len(arg) > 64 else arg  # noqa: PLR2004
              for arg in args if isinstance(arg, int | bytes))
    )  # fmt: skip


class Operations(pyfuse3.Operations):
    """The requests of one mount.

    Attributes:
        views: The disks, by inode.
        errors: The log of requests that failed.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        views: list[ExportedDisk],
        options: MountOptions,
        forget_pages: Callable[[ExportedDisk], Awaitable[bool]],
        *,
        directory: bool,
    ) -> None:
        """Show the disks as files of a directory, or the only one as the mountpoint itself.

        Args:
            views: The disks.
            options: The mount's.
            forget_pages: Has the kernel drop what it caches of a disk (`Truncation`).
            directory: Whether the mountpoint is a directory.
        """
        super().__init__()
        self.views = {view.inode: view for view in views}
        self.errors = RequestErrorLog(self.views)
        self.debug = _log.isEnabledFor(logging.DEBUG)
        # On a file as mountpoint the kernel would keep the size 0 that it starts with;
        # `qedfuse.mount.fuse.truncation` says why not with truncate=zero.
        self.enable_writeback_cache = (
            directory
            and not (options.read_only or options.direct_io)
            and options.truncate == "refuse"
        )
        self.released: Callable[[], None] = lambda: None
        """Called when the last open handle has gone."""
        self.size_lost: Callable[[ExportedDisk], None] = lambda _view: None
        """Called when the kernel may not know how long a disk is."""
        self.write_back: Callable[[ExportedDisk], Awaitable[object]] | None = None
        """Has the kernel send all that it keeps back of a disk."""
        self._options = options
        self._truncation = Truncation(options, forget_pages)
        self._directory = directory
        self._by_name = {view.name: view for view in views}
        self._attributes = Attributes(options)
        # allow_root is unknown to the kernel: everybody is let in and turned away here.
        only = options.allow_root and not options.allow_other
        self._admitted = frozenset((0, os.getuid())) if only else None

    @property
    def growable(self) -> bool:
        """Whether writes past the end and truncate(2) make a disk larger."""
        return self._options.growable

    @property
    def opened(self) -> int:
        """How many handles are open in all."""
        return sum(view.opened for view in self.views.values())

    def admit(self, uid: int) -> None:
        """Turn away whom allow_root does not let in."""
        if self._admitted is not None and uid not in self._admitted:
            raise FUSEError(errno.EACCES)

    def _is_root(self, inode: int) -> bool:
        """Tell whether an inode is the directory."""
        return self._directory and inode == pyfuse3.ROOT_INODE

    def view(self, inode: int) -> ExportedDisk:
        """Find the disk behind an inode or a handle; the number is the same."""
        view = self.views.get(inode & ~_FLAGS)
        if view is None:
            raise FUSEError(errno.EISDIR if self._is_root(inode) else errno.ENOENT)
        return view

    # Names and attributes

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name in the directory."""
        self.admit(ctx.uid)
        if not self._is_root(parent_inode):
            raise FUSEError(errno.ENOTDIR)
        if name in (b".", b".."):
            return self._attributes.of_root(list(self.views.values()))
        view = self._by_name.get(name)
        if view is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes.of_disk(view)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing: inodes live as long as the mount."""

    @_answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Describe the directory or a disk."""
        self.admit(ctx.uid)
        if self._is_root(inode):
            return self._attributes.of_root(list(self.views.values()))
        return self._attributes.of_disk(self.view(inode))

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,  # noqa: ARG002  pyfuse3's
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Set times, grow or empty a disk; refuse everything else that would change something."""
        self.admit(ctx.uid)
        if self._is_root(inode):
            raise FUSEError(errno.EPERM)
        view = self.view(inode)
        now = self._attributes.of_disk(view)
        if (
            (fields.update_mode and stat.S_IMODE(attr.st_mode) != stat.S_IMODE(now.st_mode))
            or (fields.update_uid and attr.st_uid != now.st_uid)
            or (fields.update_gid and attr.st_gid != now.st_gid)
        ):
            raise FUSEError(errno.EPERM)
        keeps_size = True
        if fields.update_size:
            keeps_size = await self._truncation.set_size(view, attr.st_size)
        if fields.update_atime or fields.update_mtime:
            await _set_times(
                view,
                attr.st_atime_ns if fields.update_atime else now.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns,
            )
        answer = self._attributes.of_disk(view)
        if not keeps_size:
            answer.st_size = attr.st_size
            answer.attr_timeout = 0
            self.size_lost(view)
        return answer

    async def grow(self, view: ExportedDisk, end: int) -> None:
        """Make a disk larger, so that it reaches to ``end`` at least, if that is allowed.

        Raises:
            FUSEError: ENOSPC, it is not allowed; EFBIG, the tables cannot address that much.
            QedError: The disk could not be changed.
        """
        if not self._options.growable:
            raise FUSEError(errno.ENOSPC)
        size = -(-end // SECTOR) * SECTOR
        if size > view.disk.header.geometry.max_image_size:
            raise FUSEError(errno.EFBIG)
        await view.disk.resize(size)

    # Data

    @_answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a disk; the kernel's cache stays, since nobody else can change the image."""
        self.admit(ctx.uid)
        view = self.view(inode)
        writer = flags & os.O_ACCMODE != os.O_RDONLY
        if writer and (self._options.read_only or view.read_only):
            raise FUSEError(errno.EROFS)
        view.opened += 1
        view.writers += writer
        exclusive = not self._options.force_share
        direct = self._options.direct_io
        handle = inode | _DIRECT if flags & os.O_DIRECT and not direct else inode
        handle |= _WRITER if writer else 0
        if direct and writer and (flags & os.O_DSYNC or "sync" in self._options.kernel_flags):
            # Of writes past its cache the kernel leaves O_DSYNC and O_SYNC to the server;
            # of all others it sends an fsync behind each.
            handle |= _SYNCED
        return pyfuse3.FileInfo(fh=handle, direct_io=direct, keep_cache=exclusive and not direct)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; short only where the disk ends."""
        view = None if self.debug else self.views.get(fh & _INODE)
        if view is not None:
            try:
                found = view.disk.try_read(off, size)
            except Exception as error:
                self.errors.bug(view.inode, "read", error)
                raise FUSEError(errno.EIO) from error
            if found is not None:
                # pyfuse3 takes any buffer, whatever its type hints say.
                return found  # type: ignore[return-value]
        return await self._read(fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write; short where the disk ends, and an error behind that."""
        view = None if self.debug else self.views.get(fh & _INODE)
        if view is not None:
            try:
                written = view.disk.try_write(off, buf)
            except Exception as error:
                self.errors.bug(view.inode, "write", error)
                raise FUSEError(errno.EIO) from error
            if written:
                return len(buf)
        return await self._write(fh, off, buf)

    @_answered
    async def _read(self, fh: int, off: int, size: int) -> bytes:
        """Read what has to be waited for."""
        return await self.view(fh).disk.read(off, size)  # type: ignore[return-value]

    @_answered
    async def _write(self, fh: int, off: int, buf: bytes) -> int:
        """Write where that may take longer, or past the end."""
        view = self.view(fh)
        end = off + len(buf)
        view.writing += 1
        try:
            if end > view.disk.size:
                await self._write_past_end(view, off, end, direct=bool(fh & _DIRECT))
            written = await view.disk.write(off, buf)
            if fh & _SYNCED:
                await view.disk.flush()
        finally:
            view.writing -= 1
        if written < len(buf) and fh & _DIRECT:
            # The kernel makes EIO of a short direct write, which hides the reason.
            raise FUSEError(errno.ENOSPC)
        return written

    async def _write_past_end(
        self, view: ExportedDisk, start: int, end: int, *, direct: bool
    ) -> None:
        """Grow the disk, or note that the kernel has to be put right.

        With the write-back cache the kernel accepts a write past the end on its own,
        takes the disk for longer from then on, and ignores that the answer to the
        delayed write is short; only an error is told to the writer, by fsync or close.
        """
        if self._options.growable and view.disk.writable:
            await self.grow(view, end)
        elif self.enable_writeback_cache and not direct:
            view.overrun = view.overrun or start < view.disk.size
            self.size_lost(view)

    @_answered
    async def flush(self, fh: int) -> None:
        """Tell the one who closes a file what went wrong with writes that were delayed."""
        self._report(fh)

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: ARG002, FBT001  pyfuse3's
        """Make everything written so far durable."""
        view = self.view(fh)
        await view.disk.flush()
        self._report(fh)

    def _report(self, fh: int) -> None:
        """Fail if writes were lost that their writer believes in.

        A write past the end is reported once, and not to a handle that cannot have written.
        """
        view = self.view(fh)
        if view.disk.failure is not None:
            raise FUSEError(errno.EIO)
        if view.overrun and fh & _WRITER:
            view.overrun = False
            raise FUSEError(errno.ENOSPC)

    @_answered
    async def release(self, fh: int) -> None:
        """Count a handle out."""
        view = self.view(fh)
        view.opened -= 1
        view.writers -= bool(fh & _WRITER)
        if not self.opened:
            self.released()

    # The directory

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open the directory."""
        self.admit(ctx.uid)
        if not self._is_root(inode):
            raise FUSEError(errno.ENOTDIR)
        return inode

    @_answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:  # noqa: ARG002
        """List the disks in the order in which they were named."""
        for place, view in enumerate(list(self.views.values())[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, view.name, self._attributes.of_disk(view), place):
                break

    async def releasedir(self, fh: int) -> None:
        """Do nothing: a directory handle holds nothing."""

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: ARG002, FBT001
        """Make all disks durable."""
        for view in self.views.values():
            await view.disk.flush()

    @_answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:  # noqa: ARG002
        """Describe the host's file system that takes the writes."""
        host = next(iter(self.views.values())).disk.statvfs()
        answer = pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail",
            "f_files", "f_ffree", "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(answer, name, getattr(host, name))
        return answer

    async def _refuse(self, *_args: object) -> NoReturn:
        """Refuse to make, remove or rename anything: the images decide what is here."""
        raise FUSEError(errno.EPERM)

    # One refusal stands in for handlers of many signatures.
    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]


async def _set_times(view: ExportedDisk, atime_ns: int, mtime_ns: int) -> None:
    """Give the image file the times that `touch` or the kernel's cache set on the disk."""
    if not view.disk.writable:
        return
    try:
        image = view.disk.fstat()
        if max(abs(image.st_atime_ns - atime_ns), abs(image.st_mtime_ns - mtime_ns)) < _ABOUT_NS:
            # The kernel tells before each fsync when it was written to; the host knows.
            return
        await view.disk.set_times(atime_ns, mtime_ns)
    except OSError as error:
        # The file may be another user's.  Nothing depends on its times.
        _log.debug("%s: cannot set times: %s", view.disk.name, error)
