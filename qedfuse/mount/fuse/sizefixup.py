"""Correcting the size of a disk that the kernel has cached.

With the write-back cache the kernel alone decides the size of a file, and a buffered write
past the end increases it.  That write fails later, when the server gets the dirty pages, but
the wrong size stays.  The kernel takes over a size only from the reply to a truncation, so
the server truncates its own file, through the mount, to the size of the disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import TYPE_CHECKING

import trio

from qedfuse.mount.system.unmount import sync_mount

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)


class SizeFixup:
    """Corrects sizes in the background, one disk after the other."""

    def __init__(self, directory: str) -> None:
        """Correct the sizes of files in the mount on ``directory``."""
        self._directory = directory
        self._pending: dict[int, ExportedDisk] = {}
        self._wake = trio.Event()

    def request(self, exported: ExportedDisk) -> None:
        """Request a correction: the kernel may take a disk for longer than it is."""
        self._pending[exported.inode] = exported
        self._wake.set()

    async def run(self, device: str) -> None:
        """Make the corrections until cancelled; ``device`` is the mount's ``MAJOR:MINOR``."""
        major, minor = device.split(":")
        number = os.makedev(int(major), int(minor))
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._pending:
                _inode, exported = self._pending.popitem()
                path = os.path.join(os.fsencode(self._directory), exported.name)  # noqa: PTH118
                exported.correcting = exported.disk.size
                try:
                    # In a thread: the kernel sends the requests for this to the server itself.
                    await trio.to_thread.run_sync(
                        self._correct, path, number, exported.correcting, abandon_on_cancel=True
                    )
                except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
                    _log.debug("%s: cannot correct the size: %s", exported.disk.name, error)
                # Not reached after a cancellation, when the thread may still be running.
                exported.correcting = -1

    def _correct(self, path: bytes, device: int, size: int) -> None:
        """Make the kernel take over the size of a file of the mount.

        Raises:
            OSError: The file is not accessible.
        """
        # O_PATH, because the close of an ordinary descriptor would consume the error that is
        # meant for the writer.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # The mount may be covered or gone by now, and the path lead to another file.
            found = os.fstat(fd)
            if found.st_dev == device and found.st_size == size:
                # Without the write-back cache the kernel takes over the size from any reply to
                # a change of attributes.  A truncation would make the kernel ignore the size
                # in replies to concurrent requests.
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode))  # noqa: PTH101
            elif found.st_dev == device:
                # The truncation drops dirty pages past the end.  Their writeback has to fail
                # before that, or the error would never be reported to their writer.
                with contextlib.suppress(OSError):
                    sync_mount(self._directory)
                os.truncate(f"/proc/self/fd/{fd}", size)
        finally:
            os.close(fd)
