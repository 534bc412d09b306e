"""A QED image with its chain as a disk that is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from qedfuse.disk.extents import Extent, Kind, joined
from qedfuse.disk.layer import RawLayer
from qedfuse.errors import HostError
from qedfuse.tools.sources import data_and_holes
from qedfuse.util.text import printable

if TYPE_CHECKING:
    import os
    from typing import Literal

    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.posixfile import PosixFile


class QedSource:
    """A QED image and its bases, locked for reading."""

    format: Literal["raw", "qed"] = "qed"

    def __init__(self, disk: Disk, path: str) -> None:
        """Read through an open disk."""
        self.disk = disk
        self.path = path
        self.name = printable(path)
        self.size = disk.size

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how the chain stores a range, holes of raw bases included."""
        found = await self.disk.extents(start, length)
        raw = {
            depth
            for depth, layer in enumerate(self.disk.chain.layers)
            if isinstance(layer, RawLayer)
        }
        if not raw:
            return found
        result: list[Extent] = []
        try:
            for extent in found:
                if extent.kind is Kind.DATA and extent.depth in raw:
                    fd = self.descriptor(extent.depth)
                    result += data_and_holes(fd, extent.start, extent.end, extent)
                else:
                    result.append(extent)
        except OSError as error:
            raise HostError.from_os(error, self.name, "seek in a base") from error
        return joined(result)

    def descriptor(self, depth: int) -> int:
        """Give the file of a layer."""
        return cast("PosixFile", self.disk.chain.layers[depth].file).fd

    def files(self) -> list[os.stat_result]:
        """Give the attributes of the image and of its bases."""
        return [layer.file.stat() for layer in self.disk.chain.layers]
