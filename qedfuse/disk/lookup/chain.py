"""The chain as one disk: an image, its base, the base's base and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.lookup.extents import Extent, Kind, joined
from qedfuse.disk.lookup.filereads import FileReads
from qedfuse.errors import BackingError, CorruptImageError, HostError
from qedfuse.util.deferredclose import close_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
    from qedfuse.disk.lookup.layer import Layer

_MAX_FLATTENED_BYTES: Final = 1 << 22
"""Maximum length of a range that is looked up in `FlattenedBacking`.  In a longer range most of the
chain is usually unallocated, and then a lookup layer by layer is faster."""


class Chain:
    """Layers from the image itself (depth 0) down to the last base.

    Attributes:
        layers: The layers, by depth.
        flattened: The layers below the image itself, merged; None if there are none.
        lacks_base: Whether the image has a base that was not opened.
        file_reads: Counts what is read of the file of each layer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        flattened: FlattenedBacking | None = None,
        *,
        lacks_base: bool = False,
    ) -> None:
        """Show open layers as one disk; for the arguments see the attributes of the class.

        With ``lacks_base``, reading an unallocated range raises BackingError.
        """
        self.layers = layers
        self.flattened = flattened
        self.lacks_base = lacks_base
        self.file_reads = FileReads(layer.file for layer in layers)

    @property
    def has_base(self) -> bool:
        """Whether unallocated ranges of the image are read from a base."""
        return len(self.layers) > 1

    async def extents(self, start: int, length: int, depth: int = 0) -> list[Extent]:
        """Return how a range is stored in the layers from ``depth`` (0 or 1) downwards.

        The extents cover the whole range, in order.  With ``depth`` 0 the range must lie within the
        disk.  A range that no layer has allocated is of kind zero, or unallocated if there is no
        base.  A range past the end of a base is of kind zero, unless a layer above stores it.

        Raises:
            HostError: The host cannot read a table.
        """
        result: list[Extent] = []
        missing = [(start, start + length)]
        if not depth:
            found = await self.layers[0].lookup(start, length)
            if len(found) == 1 and (found[0].kind is Kind.DATA or not self.has_base):
                return found
            if not self.has_base:
                return joined(found)
            result = [extent for extent in found if extent.kind is not Kind.UNALLOCATED]
            missing = [(gap.start, gap.end) for gap in found if gap.kind is Kind.UNALLOCATED]
        for first, last in missing:
            below = None
            if self.flattened is not None and last - first <= _MAX_FLATTENED_BYTES:
                below = await self.flattened.extents(first, last)
            result += below if below is not None else await self._walk(first, last)
        result.sort(key=lambda extent: extent.start)
        return joined(result)

    async def stored(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored, without the parts that no layer has allocated.

        A part past the end of a base is included, of kind zero, unless a layer above stores it.

        Raises:
            HostError: The host cannot read a table.
        """
        result, _missing = await self._descend(start, start + length, 0)
        result.sort(key=lambda extent: extent.start)
        return joined(result)

    async def _walk(self, start: int, end: int) -> list[Extent]:
        """Look up a range in the bases, one after another; the extents are not sorted."""
        result, missing = await self._descend(start, end, 1)
        bottom = len(self.layers) - 1
        result += [Extent(Kind.ZERO, first, last - first, depth=bottom) for first, last in missing]
        return result

    async def _descend(
        self, start: int, end: int, depth: int
    ) -> tuple[list[Extent], list[tuple[int, int]]]:
        """Look up a range in the layers from ``depth`` down; stop where a layer has allocated it.

        Returns the extents, not sorted, and the ranges (start and end) that no layer has
        allocated.
        """
        result: list[Extent] = []
        wanted = [(start, end)]
        for level, layer in enumerate(self.layers[depth:], depth):
            missing: list[tuple[int, int]] = []
            for first, last in wanted:
                # A layer shorter than the one above it reads as zeros past its end.
                stop = max(first, min(last, layer.size))
                if stop < last:
                    result.append(Extent(Kind.ZERO, stop, last - stop, depth=level))
                if first == stop:
                    continue
                for extent in await layer.lookup(first, stop - first):
                    if extent.kind is Kind.UNALLOCATED:
                        missing.append((extent.start, extent.end))
                    else:
                        result.append(extent._replace(depth=level))
            wanted = missing
        return result, wanted

    async def read(self, start: int, length: int, depth: int = 0) -> bytes | bytearray:
        """Read a range from the layers from ``depth`` (0 or 1) downwards.

        Raises:
            CorruptImageError: Part of the range is bad (`Kind.BAD`).
            BackingError: The range needs a base that was not opened.
            HostError: The host cannot read a file, or a file has become shorter.
        """
        if not length:
            return b""
        extents = await self.extents(start, length, depth)
        first = extents[0]
        if len(extents) == 1 and first.kind is Kind.DATA:
            file = self.layers[first.depth].file
            data = await file.pread(first.file_offset, length)
            if len(data) < length:
                self._raise_truncated(first, len(data))
            self.file_reads.count(file, length)
            return data
        buffer = bytearray(length)
        view = memoryview(buffer)
        for extent in extents:
            if extent.kind is Kind.DATA:
                at = extent.start - start
                file = self.layers[extent.depth].file
                target = view[at : at + extent.length]
                count = await file.pread_into(extent.file_offset, target)
                if count < extent.length:
                    self._raise_truncated(extent, count)
                self.file_reads.count(file, count)
            elif extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
            elif extent.kind is Kind.UNALLOCATED and self.lacks_base:
                msg = (
                    f"{self.layers[0].file.name}: read at guest offset {extent.start}: needs the "
                    "base, but the image was opened without its base"
                )
                raise BackingError(msg)
        return buffer

    def _raise_truncated(self, extent: Extent, count: int) -> None:
        """Raise HostError: the file has become shorter; it has ``count`` bytes of the extent."""
        msg = (
            f"{self.layers[extent.depth].file.name}: data at {extent.file_offset}: found "
            f"{count} bytes, expected {extent.length}"
        )
        raise HostError(msg)

    def close(self) -> None:
        """Close all files, from the image itself down to the last base.

        Raises:
            HostError: The host reports an error for a file.  All files are closed nevertheless.
        """
        close_all([layer.file for layer in self.layers])
