"""The header of an open image: a value in memory, and the same 64 bytes in the file.

A change of the header takes effect in memory when the new header has been written or, if the
caller passes a barrier, when the new header is durable.  Until then, and if the change fails,
memory holds the old header.  So a change that was reported as failed does not come back with
a later write of the header.

A write that failed may have changed the file nonetheless.  Therefore the old header is written
again immediately, and the next change writes the header once more.  The next change alone would
not suffice: if the disk has become read-only, no change follows, and the next open could find,
for example, a size that was reported as refused.

If the host's power fails after a failed datasync, the file may hold the old header or the new one.
This cannot be prevented.  If the two differ in the size of the disk, the content up to the smaller
size is the same with both.
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
        persisted: Whether the file is known to hold ``value``.  False while a change is being
            written, and after a failed change until another change has succeeded.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Hold ``header``, which was read from ``file``."""
        self._file = file
        self._lock = trio.Lock()
        # A change can also write a trailer: bytes directly behind the header.  While such a change
        # runs, this attribute holds the previous bytes between the header and the end of its
        # sector.  If the change fails, the bytes are kept until a change has succeeded,
        # and each write of the header without a trailer restores them.  Empty at other times.
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

        The header is written only if it differs from the old one, if there is a trailer, or if
        the last change failed.  While the header is being written, `value` is the old header and
        `persisted` is False.

        Args:
            edit: Returns the new header for the old one.
            only_if: Called when no other change of the header is running.  If it returns
                False, nothing is changed.  Without ``trailer`` no other task runs between
                this call and the moment when `persisted` becomes False.
            trailer: Bytes that are written directly behind the header in the same write.
                They must end within the sector.  If empty, the bytes there do not change,
                except that bytes which a failed change has overwritten are restored.
            barrier: Awaited after the write, to make the header durable.  Without a barrier
                the change takes effect when the header is written, and is durable after the
                next datasync.

        Returns:
            True if `value` is the new header now, False if ``only_if`` returned False.

        Raises:
            HostError: The host refused to read the bytes behind the header, or refused the write or
                the barrier.  `value` is the old header.
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
