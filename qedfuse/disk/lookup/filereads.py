"""For each file of a chain: how often requests have read from it, and how many bytes.

The mount's extension (``_cachedread.c``) adds its own reads to `FileReads.cells`.  Reads of tables
are not counted.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.hostio.hostfile import ReadableFile


class FileReadStatistics(NamedTuple):
    """Counters of the reads of one file.

    Attributes:
        reads: Number of reads.
        bytes: Number of bytes that were read.
    """

    reads: int
    bytes: int


class FileReads:
    """Counts the reads of the files of one chain.

    Attributes:
        cells: Two numbers for each file, from the top image down: of reads, and of bytes read.
    """

    def __init__(self, files: Iterable[ReadableFile]) -> None:
        """Count the reads of ``files``, which begin with that of the top image."""
        self._first_cell = {id(file): 2 * depth for depth, file in enumerate(files)}
        self.cells = array("Q", bytes(16 * len(self._first_cell)))

    def count(self, file: ReadableFile, length: int) -> None:
        """Count a read of ``length`` bytes of a file of the chain."""
        at = self._first_cell[id(file)]
        self.cells[at] += 1
        self.cells[at + 1] += length

    def statistics(self) -> list[FileReadStatistics]:
        """Return the counters of each file, from the top image down."""
        cells = self.cells
        return [FileReadStatistics(*cells[at : at + 2]) for at in range(0, len(cells), 2)]
