"""Correcting the kernel's cached size of a disk.

With the write-back cache the kernel ignores the size in most replies, and its cached size can
become wrong in two ways:

- A buffered write past the end increases the cached size.  Later the server refuses the dirty pages
  past the end, but the kernel keeps the wrong size.
- An fallocate(2) grows the disk and then fails.  The cached size is too small after that.

In both cases the kernel takes over a size only from the reply to a truncation.  So the server
truncates the disk's file in the mount, as a user's program would, to the size that the disk has.

Without the write-back cache, the kernel can have cached a wrong size after a truncation with
``truncate=zero`` (`qedfuse.mount.fuse.truncation`).  In this mode the kernel takes over the size
from the reply to any change of attributes.  So the server sets the permissions of the disk's file
in the mount to the permissions that the file already has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import HostError
from qedfuse.mount.system.unmount import sync_mount
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)


class SizeFixup:
    """Corrects the kernel's cached sizes, in the background and one disk at a time."""

    def __init__(self, mountpoint: str, *, is_directory: bool) -> None:
        """Make an object for the files of one mount; only `run` corrects sizes.

        Args:
            mountpoint: The path of the mountpoint.
            is_directory: Whether the mountpoint is a directory; if not, the mountpoint is the file
                of the only disk.
        """
        self._mountpoint = mountpoint
        self._is_directory = is_directory
        self._pending: dict[int, ExportedDisk] = {}
        self._wake = trio.Event()

    def request(self, exported: ExportedDisk) -> None:
        """Request a correction, because the kernel may have cached a wrong size of a disk.

        `run` makes the correction at some time after this call.  If `run` is never called, no
        correction is made.
        """
        self._pending[exported.inode] = exported
        self._wake.set()

    async def run(self, device: str) -> None:
        """Make the requested corrections until cancelled.

        A failed correction is logged and not repeated.

        Args:
            device: The device number of the mount, ``MAJOR:MINOR``.
        """
        major, minor = device.split(":")
        st_dev = os.makedev(int(major), int(minor))
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._pending:
                _inode, exported = self._pending.popitem()
                path = os.fsencode(self._mountpoint)
                if self._is_directory:
                    path = os.path.join(path, exported.name)  # noqa: PTH118
                exported.fixup_size = exported.disk.size
                try:
                    # The system calls are made in a thread, because they wait for replies of
                    # this server.
                    await run_in_thread(
                        self._correct, path, st_dev, exported.fixup_size, abandon_on_cancel=True
                    )
                except (OSError, HostError) as error:  # HostError: no thread can be started
                    _log.debug("%s: cannot correct the size: %s", exported.disk.name, error)
                # After a cancellation, the next line is not reached, and the thread may still
                # truncate the file.  So ``fixup_size`` must keep its value.  If it were -1,
                # `Truncation` would regard the truncation as a user's request.
                exported.fixup_size = -1

    def _correct(self, path: bytes, st_dev: int, size: int) -> None:
        """Make the kernel replace its cached size of a file of the mount.

        If the path leads to a file of another file system, nothing is changed.

        Args:
            path: The path of the file.
            st_dev: The device number of the mount, as in stat(2).
            size: The size of the disk in bytes.

        Raises:
            OSError: The file is not accessible, or its size or permissions cannot be set.
        """
        # The kernel reports the error of a failed writeback only once, for example when a
        # descriptor is closed.  The close of a descriptor with O_PATH reports no such error, so
        # the error is left for the program that has written.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if status.st_dev != st_dev:
                # The mount is gone, or another mount covers it.
                return
            if status.st_size == size:
                # With the write-back cache, fstat(2) returns the size that the kernel has
                # cached.  So the cached size is right already, and the chmod(2) below has no
                # effect.
                # Without the write-back cache, fstat(2) returns the server's size, but the kernel
                # does not always cache this size while other requests are in progress.  The kernel
                # always caches the size in the reply to chmod(2), which sets the permissions that
                # the file already has.  A truncation would also correct the cached size, but the
                # kernel ignores the size in all other replies until the truncation has ended.
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(status.st_mode))  # noqa: PTH101
                return
            # The truncation makes the kernel drop dirty pages past the end.  Without an attempt
            # to write these pages back, their writer would never get an error.  So the attempt is
            # made first, although it fails.
            with contextlib.suppress(OSError):
                sync_mount(self._mountpoint)
            os.truncate(f"/proc/self/fd/{fd}", size)
        finally:
            os.close(fd)
