"""The header of an open image: one value in memory, the same 64 bytes in the file.

A change of the header takes effect in memory when the new header has been written or, if the
caller passes a barrier, when it is durable.  Until then, and if the change fails, memory
holds the old header.  So a change that was reported as failed does not come back with a later
write of the header.

A write that failed may have reached the file in part or in full.  Therefore the old header is
written immediately, and again with the next change.  If the disk has become read-only, there
is no next change, so only the immediate write can keep, say, a size that was reported as
refused from showing at the next open.  After a failed datasync it is unknown which of the two
headers a power failure leaves; either is safe.
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

    A header is smaller than a sector, and a disk writes a sector whole or not at all.

    Attributes:
        value: The header after the last change that succeeded.
        persisted: Whether the file is known to hold ``value``: no change is being
            written, and the last one did not fail.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Hold ``header``, which was read from ``file``."""
        self._file = file
        self._lock = trio.Lock()
        # If a failed change may have overwritten the bytes behind the header in its sector,
        # the bytes that were there before.  They are written with the next header.
        self._trailer_to_restore = b""
        self.value = header
        self.persisted = True

    async def change(
        self,
        edit: Callable[[Header], Header],
        only_if: Callable[[], bool] = lambda: True,
        trailer: bytes = b"",
        barrier: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Write the header that ``edit`` returns; return whether ``only_if`` allowed that.

        Nothing is written if the new header equals the old one and there is no trailer,
        unless the last change failed.  While the header is being written, `value` is the old
        header and `persisted` is False.

        Args:
            edit: Returns the new header for the old one.
            only_if: Called when no other change of the header is running.  If it returns
                False, nothing is changed.  Without ``trailer`` no other task runs between
                this call and the moment when `persisted` becomes False.
            trailer: Bytes that are written directly behind the header in the same write.
                They must end within the sector.
            barrier: Awaited after the write, to make the header durable.  Without it the
                change takes effect when it is written, and is durable after the next
                datasync.

        Returns:
            True if `value` is the new header now, False if ``only_if`` returned False.

        Raises:
            HostError: The host refused; `value` is the old header.
        """
        async with self._lock:
            if not only_if():
                return False
            new = edit(self.value)
            if new != self.value or trailer or not self.persisted:
                if trailer and not self._trailer_to_restore:
                    before = await self._file.pread(HEADER_BYTES, SECTOR - HEADER_BYTES)
                    self._trailer_to_restore = bytes(before)
                self.persisted = False
                written = trailer or self._trailer_to_restore
                try:
                    await self._file.pwrite(0, build_header(new) + written)
                    if barrier is not None:
                        await barrier()
                except BaseException:
                    await self._restore()
                    raise
                self._trailer_to_restore = b""
                self.value = new
                self.persisted = True
            return True

    async def _restore(self) -> None:
        """Write the old header over a change that failed; ignore it if the host refuses."""
        with trio.CancelScope(shield=True), suppress(HostError):
            await self._file.pwrite(0, build_header(self.value) + self._trailer_to_restore)
