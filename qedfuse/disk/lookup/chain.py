"""The chain of images seen as one disk: an image, its base, the base's base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.extents import Extent, Kind, joined
from qedfuse.errors import BackingError, CorruptImageError, HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
    from qedfuse.disk.lookup.layer import Layer

_FLAT_BYTES = 1 << 22
"""Longest range that is looked up in `FlattenedBacking`: longer ones are mostly holes."""


class Chain:
    """Layers from the image itself (depth 0) down to the last base."""

    def __init__(
        self,
        layers: Sequence[Layer],
        flattened: FlattenedBacking | None = None,
        *,
        lacks_base: bool = False,
    ) -> None:
        """Stack layers that are open already.

        Args:
            layers: The image itself, then its bases.
            flattened: The layers below the image itself, merged.
            lacks_base: The image has a base that was not opened, so what it would show
                cannot be read.
        """
        self.layers = layers
        self.flattened = flattened
        self.lacks_base = lacks_base

    @property
    def has_base(self) -> bool:
        """Whether anything shows through where the image itself has nothing."""
        return len(self.layers) > 1

    async def extents(self, start: int, length: int, depth: int = 0) -> list[Extent]:
        """Tell how a range is stored, looking from ``depth`` downwards; 0 or 1.

        What no layer has, and what lies past the end of a layer, comes out as zeros; at
        depth 0 a range that the image itself and no base has is still told as
        unallocated.
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
            missing = [(part.start, part.end) for part in found if part.kind is Kind.UNALLOCATED]
        for first, last in missing:
            shown = None
            if self.flattened is not None and last - first <= _FLAT_BYTES:
                shown = await self.flattened.extents(first, last)
            result += shown if shown is not None else await self._walk(first, last)
        result.sort(key=lambda extent: extent.start)
        return joined(result)

    async def stored(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored, without what no layer has."""
        result, _missing = await self._descend(start, start + length, 0)
        result.sort(key=lambda extent: extent.start)
        return joined(result)

    async def _walk(self, start: int, end: int) -> list[Extent]:
        """Tell how a range shows through the top image, by asking layer after layer."""
        result, missing = await self._descend(start, end, 1)
        bottom = len(self.layers) - 1
        result += [Extent(Kind.ZERO, first, last - first, depth=bottom) for first, last in missing]
        return result

    async def _descend(
        self, start: int, end: int, depth: int
    ) -> tuple[list[Extent], list[tuple[int, int]]]:
        """Ask layer after layer from ``depth`` down, each for what those above do not have.

        Returns:
            The extents, in no order, and the ranges that no layer has.
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
        """Read a range, looking from ``depth`` downwards.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            BackingError: A base that was not opened would show through.
            HostError: The host cannot read a file.
        """
        if not length:
            return b""
        extents = await self.extents(start, length, depth)
        first = extents[0]
        if len(extents) == 1 and first.kind is Kind.DATA:
            file = self.layers[first.depth].file
            data = await file.pread(first.file_offset, length)
            if len(data) < length:
                self._cut_short(first, len(data))
            return data
        buffer = bytearray(length)
        view = memoryview(buffer)
        for extent in extents:
            if extent.kind is Kind.DATA:
                at = extent.start - start
                file = self.layers[extent.depth].file
                part = view[at : at + extent.length]
                count = await file.pread_into(extent.file_offset, part)
                if count < extent.length:
                    self._cut_short(extent, count)
            elif extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
            elif extent.kind is Kind.UNALLOCATED and self.lacks_base:
                msg = (
                    f"{self.layers[0].file.name}: read: found a base to read from at "
                    f"{extent.start}, and the image opened without it"
                )
                raise BackingError(msg)
        return buffer

    def _cut_short(self, extent: Extent, count: int) -> None:
        """Refuse to make up what a file lost while we had it open."""
        msg = (
            f"{self.layers[extent.depth].file.name}: data at {extent.file_offset}: found "
            f"{count} bytes, expected {extent.length}"
        )
        raise HostError(msg)

    def close(self) -> None:
        """Let all files go, the base last."""
        for layer in self.layers:
            layer.file.close()
