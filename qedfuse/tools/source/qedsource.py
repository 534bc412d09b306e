"""A QED image with its chain as a disk that is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.text import printable
from qedfuse.tools.source.chainruns import ChainRunReader
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    import os
    from typing import Literal

    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.posixfile import PosixFile

_KINDS: Final = {UNALLOCATED: Kind.UNALLOCATED, ZEROS: Kind.ZERO, HOLE: Kind.ZERO, DATA: Kind.DATA}


class QedSource:
    """A QED image and its bases, locked for reading."""

    format: Literal["raw", "qed"] = "qed"

    def __init__(self, disk: Disk, path: str) -> None:
        """Read through an open disk."""
        self._disk = disk
        self._runs = ChainRunReader(list(disk.chain.layers))
        self.path = path
        self.name = printable(path)
        self.size = disk.size

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how the chain stores a range or the beginning of it, holes of raw bases included."""
        end = min(start + length, self.size)
        if start >= end:
            return []
        batch = await self._runs.read(start, end)
        columns = (batch.starts, batch.lengths, batch.depths, batch.kinds, batch.offsets)
        result: list[Extent] = []
        for at, count, depth, kind, offset in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            if kind == BAD:
                # Why it is bad is not told of thousands at a time.
                result += await self._disk.extents(at, count)
            else:
                result.append(Extent(_KINDS[kind], at, count, offset, depth))
        return result

    def descriptor(self, depth: int) -> int:
        """Give the file of a layer."""
        return cast("PosixFile", self._disk.chain.layers[depth].file).fd

    def files(self) -> list[os.stat_result]:
        """Give the attributes of the image and of its bases."""
        return [layer.file.stat() for layer in self._disk.chain.layers]
