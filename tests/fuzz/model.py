"""A model of a disk: the content that programs see, and what a kill may leave of it.

The model keeps a list of versions for each 512-byte sector.  Programs see the last one.  The
first one is durable: an fsync(2) that began after it was written has returned.  After a kill
of the server a sector holds one of its versions.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

SECTOR: Final = 512


class Version(NamedTuple):
    """One content of a sector, and when it was written."""

    number: int
    data: bytes


class Model:
    """The disk as programs see it; may be used by several threads.

    Two threads must not change the same sector concurrently.

    Attributes:
        size: Bytes of the disk.
        durable_size: Bytes of the disk that a kill cannot undo.
    """

    def __init__(self, content: bytes) -> None:
        """Begin with a content that is durable."""
        self.size = self.durable_size = len(content)
        self._sectors = [
            [Version(0, content[at : at + SECTOR])] for at in range(0, len(content), SECTOR)
        ]
        self._lock = threading.Lock()
        self._number = 0
        self._running: dict[int, int] = {}
        self._changed: set[int] = set()

    def read(self, start: int, length: int) -> bytes:
        """Return what programs see of a range."""
        first, last = start // SECTOR, -(-(start + length) // SECTOR)
        data = b"".join(versions[-1].data for versions in self._sectors[first:last])
        return data[start - first * SECTOR :][:length]

    def begin(self, start: int, data: bytes) -> int:
        """Note that bytes will be written; return the number for `end`.

        From here on a kill may leave them, whether the write succeeds or not.
        """
        first = start // SECTOR
        end = -(-(start + len(data)) // SECTOR)
        whole = bytearray(self.read(first * SECTOR, (end - first) * SECTOR))
        at = start - first * SECTOR
        whole[at : at + len(data)] = data
        with self._lock:
            self._number += 1
            self._running[self._number] = first
            for sector in range(first, end):
                content = bytes(whole[(sector - first) * SECTOR :][:SECTOR])
                self._sectors[sector].append(Version(self._number, content))
                self._changed.add(sector)
            return self._number

    def end(self, number: int) -> None:
        """Note that the write with a number has succeeded."""
        with self._lock:
            del self._running[number]

    def grow(self, size: int) -> None:
        """Make the disk larger; what is added reads as zeros."""
        with self._lock:
            for _ in range(self.size, size, SECTOR):
                self._sectors.append([Version(0, bytes(SECTOR))])
            self.size = size

    def begin_sync(self) -> tuple[int, int]:
        """Return a mark for `end_sync`: all writes that have ended by now."""
        with self._lock:
            return min(self._running, default=self._number + 1), self.size

    def end_sync(self, mark: tuple[int, int]) -> None:
        """Note that all writes before a mark are durable."""
        limit, size = mark
        with self._lock:
            self.durable_size = max(self.durable_size, size)
            for sector in list(self._changed):
                versions = self._sectors[sector]
                done = [index for index, one in enumerate(versions) if one.number < limit]
                if done:  # a sync that began later can have ended before
                    del versions[: done[-1]]
                if len(versions) == 1:
                    self._changed.discard(sector)

    def adopt(self, content: bytes) -> str | None:
        """Take over the content that a kill has left, if the model allows it.

        Returns:
            None if it does; otherwise the first difference, in words.
        """
        if not self.durable_size <= len(content) <= self.size:
            return f"size {len(content)}, expected {self.durable_size} to {self.size}"
        for sector, versions in enumerate(self._sectors[: len(content) // SECTOR]):
            found = content[sector * SECTOR :][:SECTOR]
            if all(found != one.data for one in versions):
                return (
                    f"sector {sector} (offset {sector * SECTOR}): found {found[:16].hex()}..., "
                    f"expected one of {[one.data[:16].hex() for one in versions]}"
                )
            versions[:] = [Version(0, found)]
        del self._sectors[len(content) // SECTOR :]
        self.size = self.durable_size = len(content)
        self._changed.clear()
        self._running.clear()
        return None
