"""Making the kernel forget a wrong ``st_blocks`` of a disk after a flush.

The kernel caches the attributes of a disk (`Attributes`), but ``st_blocks`` changes without a
request of the kernel when the image file gets or loses space on the host.  After each invalidation
the kernel asks for the attributes again.  To answer, the server must read the times of the image
file, which slows down later changes of the file (see `qedfuse.hostio.systemcalls.size_and_blocks`).
So thousands of fsync(2) a second must not cause as many invalidations.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

MIN_INTERVAL_SECONDS: Final = 0.1
"""For how long a check of ``st_blocks`` is postponed if it follows another one too closely.  Until
then du(1) may show a wrong size."""


class BlocksInvalidator:
    """Invalidates the kernel's ``st_blocks`` of one disk's files if a flush has made them wrong.

    The files are that of the whole disk and those of its partitions.
    """

    def __init__(
        self,
        files: Callable[[], Iterable[ExportedDisk]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch the files that ``files`` returns, all of one disk; ``clock`` returns seconds."""
        self._files = files
        self._clock = clock
        self._checked_at = float("-inf")
        self._deferred = trio.Event()

    def flushed(self) -> None:
        """Note that a flush has ended; check now, or later in `run` if the last check was recent.

        Does nothing if the kernel caches no ``st_blocks`` of these files.
        """
        if all(exported.cached_blocks < 0 for exported in self._files()):
            return
        if self._clock() - self._checked_at >= MIN_INTERVAL_SECONDS:
            self._check()
        else:
            self._deferred.set()

    async def run(self) -> None:
        """Make the checks that `flushed` has deferred; a background task, which never returns."""
        while True:
            await self._deferred.wait()
            await trio.sleep(MIN_INTERVAL_SECONDS)
            self._deferred = trio.Event()
            self._check()

    def _check(self) -> None:
        """Invalidate the attributes that the kernel has cached, if ``st_blocks`` is wrong."""
        self._checked_at = self._clock()
        for exported in self._files():
            if exported.cached_blocks == -1:
                continue
            try:
                blocks = exported.visible_blocks(exported.disk.stored_blocks())
            except HostError:
                return  # the kernel keeps the old value until a later check
            if exported.cached_blocks != blocks:
                exported.cached_blocks = -1
                with suppress(OSError):  # the kernel may have forgotten the inode
                    pyfuse3.invalidate_inode(exported.inode, attr_only=True)
