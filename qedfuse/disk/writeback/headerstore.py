"""The header of an open image: a value in memory, and the same 64 bytes in the file.

A change takes effect in memory when the new header has been written or, with a barrier, when it is
durable.  If the change fails, memory keeps the old header.  So a change that was reported as failed
does not come back with a later write.

A write that failed may have changed the file nonetheless.  Therefore the old header is written
again immediately, and the next change writes the header once more.  The next change alone would not
suffice: if the disk has become read-only, no change follows, and the next open could find a size
that was reported as refused.

If the host's power fails after a failed datasync, the file may hold the old header or the new one.
If the two differ in the size of the disk, the content up to the smaller size is the same with both.
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
    """Makes all changes of the header, one at a time.

    The header lies in one sector, and the host's disk writes a sector whole or not at all.  So a
    crash leaves the old header or the new one.

    Attributes:
        value: The header after the last change that succeeded.
        persisted: Whether the file is known to hold ``value``.  False during a write of the header,
            and after a failed write until another change has succeeded.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Hold ``header``, which was read from ``file``."""
        self._file = file
        self._lock = trio.Lock()
        # A change can also write a trailer: bytes directly behind the header, in the same sector.
        # Until that change or a later one succeeds, this attribute holds the bytes that were there
        # before, and each write of the header without a trailer restores them.  Otherwise empty.
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

        Nothing is written if the file already holds the new header and there is no trailer.  During
        the write `value` is the old header and `persisted` is False.

        Args:
            edit: Returns the new header for the old one.
            only_if: Called when no other change of the header is running.  If it returns
                False, nothing is changed.  Without ``trailer`` no other task runs between
                this call and the moment when `persisted` becomes False.
            trailer: Bytes that are written directly behind the header in the same write.
                They must end within the sector.
            barrier: Awaited after the write, to make the header durable.

        Returns:
            True if `value` is the new header now, False if ``only_if`` returned False.

        Raises:
            HostError: The host refused to read, to write or to make durable.  `value` is the old
                header.
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
                bytes_behind = trailer or self._trailer_to_restore
                try:
                    await self._file.pwrite(0, build_header(new) + bytes_behind)
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
        """Write the old header over a change that failed; return even if the host refuses."""
        with trio.CancelScope(shield=True), suppress(HostError):
            await self._file.pwrite(0, build_header(self.value) + self._trailer_to_restore)
