"""The header of an open image: one value in memory, the same 64 bytes in the file.

A change of the header is there when it was written, or where the caller asks for that,
when it is durable; until then, and if it fails, memory holds what was there before.  So
what was reported as failed never comes back with the next write of the header.

After a failure part of the write, or all of it, may be in the file.  So the old header is
written back immediately, and again with the next change.  If the disk has become read-only
there is no next change; then the first of the two keeps a size that was refused from
showing at the next open.  Which of the two headers a power failure leaves nobody knows
then, because a datasync has failed; either is safe.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import HostError
from qedfuse.ondisk.constants import HEADER_BYTES, SECTOR
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


class HeaderStore:
    """Serialises all changes of the header.

    A header is smaller than a sector, which a disk writes whole or not at all.

    Attributes:
        value: The header after the last change that did not fail.
        settled: Whether the file is known to hold ``value``: no change of it is under
            way, and the last one did not fail.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Hold the header that was read from ``file``."""
        self._file = file
        self._lock = trio.Lock()
        # What belongs behind ``value`` in its sector, if a change that failed may have
        # written something else there.
        self._due_trailer = b""
        self.value = header
        self.persisted = True

    async def change(
        self,
        edit: Callable[[Header], Header],
        only_if: Callable[[], bool] = lambda: True,
        trailer: bytes = b"",
        barrier: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Write the header that ``edit`` makes of the present one, unless it is the same.

        Whoever asks while the change is under way sees the old value, and that it is not
        settled; he waits for the lock if either does not suit him.  After a failure the
        next change writes again, also if it changes nothing.

        Args:
            edit: Makes the new header of the old one.
            only_if: Asked in the same moment as the write begins; the change is dropped
                if it says no.
            trailer: Written in the same write, right behind the header; it must end
                within the sector.
            barrier: Awaited after the write; makes it durable.  Without it the change
                counts as done once it is written, and is durable after the next datasync.

        Returns:
            Whether the header is now as asked.

        Raises:
            HostError: The host refused; the header is as it was.
        """
        async with self._lock:
            if not only_if():
                return False
            new = edit(self.value)
            if new != self.value or trailer or not self.persisted:
                if trailer and not self._due_trailer:
                    before = await self._file.pread(HEADER_BYTES, SECTOR - HEADER_BYTES)
                    self._due_trailer = bytes(before)
                self.persisted = False
                written = trailer or self._due_trailer
                try:
                    await self._file.pwrite(0, build_header(new) + written)
                    if barrier is not None:
                        await barrier()
                except BaseException:
                    await self._write_back()
                    raise
                self._due_trailer = b""
                self.value = new
                self.persisted = True
            return True

    async def _write_back(self) -> None:
        """Write the header in memory over a change that failed, if the host lets us."""
        with trio.CancelScope(shield=True), suppress(HostError):
            await self._file.pwrite(0, build_header(self.value) + self._due_trailer)
