"""Putting the kernel right about the length of a disk.

With the write-back cache the kernel alone decides how long a file is, and a buffered
write past the end makes it longer.  The write itself fails later, when the dirty pages
come to us, but the length stays wrong.  Only a truncation is answered with a length that
the kernel takes over, so we truncate our own file, through the mount, to what it has.
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
    """Corrects the kernel in the background."""

    def __init__(self, directory: str, device: str) -> None:
        """Work on the files of the mount at ``directory`` with the number ``device``."""
        self._directory = directory
        major, minor = device.split(":")
        self._device = os.makedev(int(major), int(minor))
        self._wrong: dict[int, ExportedDisk] = {}
        self._wake = trio.Event()

    def lost(self, view: ExportedDisk) -> None:
        """Note that the kernel may take a disk for longer than it is."""
        self._wrong[view.inode] = view
        self._wake.set()

    async def run(self) -> None:
        """Correct one disk after the other, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._wrong:
                _inode, view = self._wrong.popitem()
                path = os.path.join(os.fsencode(self._directory), view.name)  # noqa: PTH118
                view.correcting = view.disk.size
                try:
                    # In a thread: what it asks of the kernel the kernel asks of us.
                    await trio.to_thread.run_sync(
                        self._correct, path, view.correcting, abandon_on_cancel=True
                    )
                except (OSError, RuntimeError) as error:  # the latter: no thread can be started
                    _log.debug("%s: cannot correct the size: %s", view.disk.name, error)
                # Not after a cancellation: then the thread may still be at it.
                view.correcting = -1

    def _correct(self, path: bytes, size: int) -> None:
        """Make the kernel take the size that a file of the mount has.

        Raises:
            OSError: It cannot be reached.
        """
        # Without opening it: our closing would take the error that is meant for the writer.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # The mount may be hidden or gone by now, and another file be in its place.
            found = os.fstat(fd)
            if found.st_dev == self._device and found.st_size == size:
                # Without the write-back cache the kernel takes the size from any answer that
                # changes attributes.  A truncation would make it ignore the size in answers
                # to others meanwhile.
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode))  # noqa: PTH101
            elif found.st_dev == self._device:
                # Dirty pages behind the end vanish with the truncation.  They have to
                # fail first, or nobody would ever tell their writer.
                with contextlib.suppress(OSError):
                    sync_mount(self._directory)
                os.truncate(f"/proc/self/fd/{fd}", size)
        finally:
            os.close(fd)
