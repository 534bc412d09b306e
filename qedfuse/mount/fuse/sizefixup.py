"""Correcting the kernel's cached size of a disk.

With the write-back cache the kernel takes over a size only from the reply to a truncation.  Its
cached size is too large after a buffered write past the end that fails, and too small after an
fallocate(2) that grows the disk and then fails.  So the server truncates the disk's file in the
mount to the size that the disk has.

On a disk that can grow, a program may write past the end just before a truncation that makes the
cached size smaller.  The kernel then drops this write, which it has accepted.  So the cached size
is made smaller only after a write past the end has failed, and the writes that the kernel has
accepted are sent first.  One window stays: a write that the kernel accepts after that, and before
the truncation, is dropped without an error.

Without the write-back cache, the cached size can be wrong after a truncation with ``truncate=zero``
(`qedfuse.mount.fuse.truncation`).  In this mode the kernel takes over the size from the reply to
any change of attributes.  So the server sets the permissions that the file already has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from functools import partial
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import HostError
from qedfuse.hostio.regular import identity_of
from qedfuse.mount.system.unmount import sync_mount
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import FileIdentity
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)


class SizeFixup:
    """Corrects the kernel's cached sizes, in the background and one disk at a time."""

    def __init__(self, mountpoint: str, *, is_directory: bool) -> None:
        """Make an object for the files of one mount; ``run`` corrects the sizes.

        Args:
            mountpoint: The path of the mountpoint.
            is_directory: Whether the mountpoint is a directory, not the file of the only disk.
        """
        self._mountpoint = mountpoint
        self._is_directory = is_directory
        # The values say whether the cached size may be made smaller.
        self._pending: dict[int, tuple[ExportedDisk, bool]] = {}
        self._wake = trio.Event()

    def request(self, exported: ExportedDisk, *, may_shrink: bool = True) -> None:
        """Request that `run` corrects the size of a disk later.

        Args:
            exported: The disk.
            may_shrink: Whether the kernel's cached size can be too large.  If not, a size that is
                larger than the disk's comes from writes that will grow the disk, and stays.
        """
        _, may_shrink_already = self._pending.get(exported.inode, (exported, False))
        self._pending[exported.inode] = exported, may_shrink or may_shrink_already
        self._wake.set()

    async def run(self, device: str) -> None:
        """Make the requested corrections until cancelled.

        A correction that fails because the disk has grown is tried again.  Any other failure is
        logged, and ends the correction.

        Args:
            device: The device number of the mount, ``MAJOR:MINOR``.
        """
        major, minor = device.split(":")
        st_dev = os.makedev(int(major), int(minor))
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._pending:
                inode, (exported, may_shrink) = self._pending.popitem()
                path = os.fsencode(self._mountpoint)
                if self._is_directory:
                    path = os.path.join(path, exported.name)  # noqa: PTH118
                try:
                    # In a thread, because the system calls wait for replies of this server.
                    await run_in_thread(
                        partial(self._correct, may_shrink=may_shrink),
                        *(path, (st_dev, inode), exported),
                        abandon_on_cancel=True,
                    )
                except (OSError, HostError) as error:  # HostError: no thread can be started
                    if exported.disk.size != exported.fixup_size != -1:
                        # The disk has grown since its size was read, so `Truncation` has refused
                        # the request.
                        self.request(exported, may_shrink=may_shrink)
                    else:
                        _log.debug("%s: cannot correct the size: %s", exported.disk.name, error)
                # A cancellation leaves this method before this line, because the thread may still
                # truncate the file then.  With -1, `Truncation` would take that for a user's
                # request.
                exported.fixup_size = -1

    def _correct(
        self, path: bytes, expected: FileIdentity, exported: ExportedDisk, *, may_shrink: bool
    ) -> None:
        """Make the kernel replace its cached size of a file, if its identity is ``expected``."""
        # The kernel reports the error of a failed writeback only once, for example when a
        # descriptor is closed.  With O_PATH the close reports no such error, so the error is left
        # for the program that has written.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if identity_of(status) != expected:
                # The mount is gone, or another mount covers it.  Or the partition table has
                # changed, and another partition has the name.
                return
            if status.st_size == exported.disk.size:
                # With the write-back cache, fstat(2) returns the cached size, which is then right.
                # Without it, fstat(2) returns the server's size, but the kernel may not have cached
                # this size: until a truncation has ended, it ignores the sizes in replies to most
                # other requests.  It always caches the size in the reply to chmod(2).
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(status.st_mode))  # noqa: PTH101
                return
            if status.st_size > exported.disk.size and not may_shrink:
                return
            # The truncation makes the kernel drop dirty pages past the end.  Without an attempt to
            # write these pages back, their writer would never get an error.
            with contextlib.suppress(OSError):
                sync_mount(self._mountpoint)
            # Only now, because the disk grows by writes of these pages that succeed.
            exported.fixup_size = exported.disk.size
            os.truncate(f"/proc/self/fd/{fd}", exported.fixup_size)
        finally:
            os.close(fd)
