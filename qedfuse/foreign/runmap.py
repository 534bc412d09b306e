"""A map of a disk: each range lies in a file, reads as zeros, or can be read only by QEMU.

The map is made from the beginning of the disk on, and can be read meanwhile.  It has a fixed
maximum size, so it may end before the disk does.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

UNKNOWN: Final = -1
"""In place of the number of a file: only QEMU can read the range."""
ZEROS: Final = -2
"""In place of the number of a file: the range reads as zeros."""

MAX_FILES: Final = 254
"""Maximum number of files: a run has 8 bits for the file, and two values have other meanings."""
MAX_RUN_OFFSET: Final = 1 << 55
"""Maximum disk offset at which a run ends."""
MAX_RUNS: Final = 1 << 20
"""Maximum number of runs of a map; each run takes 16 bytes of memory."""

_COUNT, _END = 0, 1
"""Indices in `RunMap.cells` of the number of runs, and of the disk offset at which they end."""
_FIRST_START: Final = 2
"""Index in `RunMap.cells` of the array of starts; the array of targets comes after it."""
_FILE_BIAS: Final = 2
_FILE_BITS: Final = 8
_UNKNOWN_TARGET: Final = 0
_ZEROS_TARGET: Final = 1


class Part(NamedTuple):
    """A part of a range of the disk: it lies in one file, is zeros, or only QEMU can read it.

    Attributes:
        file: The number of the file that has the bytes, or `UNKNOWN`, or `ZEROS`.
        offset: File offset of the part's first byte; 0 if ``file`` is `UNKNOWN` or `ZEROS`.
        start: Disk offset of the part's first byte.
        length: Length in bytes.
    """

    file: int
    offset: int
    start: int
    length: int


class RunMap:
    """Runs in the order of the disk: each run ends where the next one begins.

    A run has a start, which is a disk offset, and a target.  The target is 0 if only QEMU can read
    the run, and 1 for zeros.  Otherwise it is ``256 * offset + number + 2``, with the file offset
    of the run and the number of the file.  ``_readfiles.c`` decodes these targets as well.

    One thread adds runs while others search.  A run is written first, then the count, then the end,
    and `parts` reads them in the reverse order.  So a search finds a new run as a whole or not at
    all.  The mount's extension does not need this order, because it holds the GIL during a search.

    Attributes:
        cells: The count, the end, all starts and all targets; see
            `qedfuse.hostio.pagesource.StoredRuns`.
        capacity: Maximum number of runs.
    """

    def __init__(self, capacity: int = MAX_RUNS) -> None:
        """Start without runs.

        Raises:
            OSError: The host has no memory.
        """
        # The kernel provides memory only for those pages of the mapping that are written to.
        memory = mmap.mmap(-1, 8 * (_FIRST_START + 2 * capacity), mmap.MAP_PRIVATE)
        self.cells = memoryview(memory).cast("Q")
        self.capacity = capacity
        self._first_target = _FIRST_START + capacity

    @property
    def end(self) -> int:
        """The disk offset at which the last run ends."""
        return self.cells[_END]

    def add(self, length: int, file: int, offset: int = 0) -> bool:
        """Add a range that follows the last run; return False if the map is full.

        A range that continues the last run makes this run longer, even in a full map.

        Args:
            length: Length of the range in bytes.
            file: Number of the file that has the bytes, or `UNKNOWN`, or `ZEROS`.
            offset: File offset of the range's first byte; ignored if no file has the bytes.
        """
        cells = self.cells
        count, start = cells[_COUNT], cells[_END]
        if file == UNKNOWN:
            target = _UNKNOWN_TARGET
        elif file == ZEROS:
            target = _ZEROS_TARGET
        else:
            target = offset << _FILE_BITS | file + _FILE_BIAS
        if not count or target != self._continued(count - 1, start):
            if count == self.capacity:
                return False
            cells[_FIRST_START + count] = start
            cells[self._first_target + count] = target
            cells[_COUNT] = count + 1
        cells[_END] = start + length
        return True

    def _continued(self, index: int, start: int) -> int:
        """Return the target that a run at ``start`` must have to continue the run ``index``."""
        target = self.cells[self._first_target + index]
        if target <= _ZEROS_TARGET:
            return target
        return target + (start - self.cells[_FIRST_START + index] << _FILE_BITS)

    def parts(self, start: int, length: int) -> Iterator[Part]:
        """Yield the parts of a range of the disk, in order; `UNKNOWN` where the map has no run."""
        cells = self.cells
        # The end is read before the count, because `add` changes it after the count.  Otherwise a
        # run that is added between the two reads would seem to belong to the run before.
        map_end, count, end = cells[_END], cells[_COUNT], start + length
        index = bisect_right(cells, start, _FIRST_START, _FIRST_START + count) - _FIRST_START - 1
        while start < min(end, map_end):
            is_last = index + 1 == count
            stop = min(end, map_end if is_last else cells[_FIRST_START + index + 1])
            target = self._continued(index, start)
            if target <= _ZEROS_TARGET:
                yield Part((UNKNOWN, ZEROS)[target], 0, start, stop - start)
            else:
                file = (target & (1 << _FILE_BITS) - 1) - _FILE_BIAS
                yield Part(file, target >> _FILE_BITS, start, stop - start)
            start, index = stop, index + 1
        if start < end:
            yield Part(UNKNOWN, 0, start, end - start)


def without_zeros(
    parts: Iterable[Part], offset: int, view: memoryview
) -> Iterator[tuple[Part, memoryview]]:
    """Fill a view with zeros where the disk has zeros; yield the other parts.

    The view begins at disk offset ``offset``.  Each part comes with its piece of the view.
    """
    for part in parts:
        into = view[part.start - offset :][: part.length]
        if part.file == ZEROS:
            into[:] = bytes(part.length)
        else:
            yield part, into
