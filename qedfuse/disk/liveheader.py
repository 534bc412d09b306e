"""The header of an open image: one value in memory, the same 64 bytes in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


class LiveHeader:
    """Serialises all changes of the header.

    A header is smaller than a sector, which a disk writes whole or not at all.

    Attributes:
        value: The header as it is, or is about to be.
        settled: Whether the file is known to hold ``value``: no write of it is under
            way, and the last one did not fail.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Hold the header that was read from ``file``."""
        self._file = file
        self._lock = trio.Lock()
        self._behind = b""
        self.value = header
        self.settled = True

    async def change(
        self,
        edit: Callable[[Header], Header],
        only_if: Callable[[], bool] = lambda: True,
        behind: bytes = b"",
    ) -> bool:
        """Write the header that ``edit`` makes of the present one, unless it is the same.

        The value changes before the write begins, so that whoever asks while it is
        under way sees the new one, and that it is not settled; he waits for the lock if
        either does not suit him.  After a failed write the next change writes again,
        also if it changes nothing.  ``only_if`` is asked in the same moment as the value
        changes; the change is dropped if it says no.  ``behind`` is written in the same
        write, right behind the header; it must end within the sector.

        Returns:
            Whether the header is now as asked.  Not durable before the next datasync.
        """
        async with self._lock:
            if not only_if():
                return False
            new = edit(self.value)
            if new != self.value or behind or not self.settled:
                self.value = new
                self.settled = False
                # What has not been written remains due: the header may refer to it.
                behind = self._behind = behind or self._behind
                await self._file.pwrite(0, build_header(new) + behind)
                self.settled = True
                self._behind = b""
            return True
