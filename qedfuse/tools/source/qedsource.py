"""A QED image with its chain, as a disk that is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.tools.source.chainruns import ChainRunReader
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.tools.common.formatprobe import ImageFormat

_KINDS: Final = {UNALLOCATED: Kind.UNALLOCATED, ZEROS: Kind.ZERO, HOLE: Kind.ZERO, DATA: Kind.DATA}
"""The kind of the extent for each kind of run, except `BAD`."""


class QedSource:
    """A QED image and its bases as a `Source`."""

    format: ImageFormat = "qed"

    def __init__(self, disk: Disk, path: str) -> None:
        """Prepare to read an open disk, which the caller closes later."""
        self._disk = disk
        self._reader = ChainRunReader(list(disk.chain.layers))
        self.path = path
        self.name = disk.name
        self.size = disk.size
        self.is_device = False

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return how the chain stores a range, or the beginning of it; see `Source.extents`."""
        end = min(start + length, self.size)
        if start >= end:
            return []
        runs = await self._reader.read(start, end)
        columns = (runs.starts, runs.lengths, runs.depths, runs.kinds, runs.offsets)
        result: list[Extent] = []
        for run_start, run_length, depth, kind, offset in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            if kind == BAD:
                # Looked up again, because a run does not say what is wrong with the table entry.
                result += await self._disk.extents(run_start, run_length)
            else:
                result.append(Extent(_KINDS[kind], run_start, run_length, offset, depth))
        return result

    def layer_files(self) -> list[HostFile]:
        """Return the open files of the image and of its bases, by depth."""
        return [layer.file for layer in self._disk.chain.layers]
