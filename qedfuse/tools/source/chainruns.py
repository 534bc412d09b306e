"""How a whole chain stores a range of the disk, as arrays: the runs of each layer combined.

A layer shows through where the layers above it have nothing.  The chain is read range by
range, each as long as a few slices of tables describe, so a disk of any size takes little
memory.  All work is done on whole arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import trio

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, QedRunReader, RawRunReader, Runs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.hostio.posixfile import PosixFile

    Array = NDArray[np.int64]


@dataclass(slots=True)
class ChainRuns:
    """Neighbouring extents as arrays of one length; the kinds are those of `Runs`."""

    starts: Array
    lengths: Array
    depths: Array
    kinds: NDArray[np.uint8]
    offsets: Array

    def __len__(self) -> int:
        """Tell how many extents there are."""
        return len(self.starts)

    @property
    def end(self) -> int:
        """Where the last one ends."""
        return int(self.starts[-1] + self.lengths[-1])

    def count_bad(self) -> int:
        """Tell how many of them nobody can tell anything about."""
        return int((self.kinds == BAD).sum())

    def part(self, which: slice) -> ChainRuns:
        """Give some of the extents."""
        return ChainRuns(
            self.starts[which],
            self.lengths[which],
            self.depths[which],
            self.kinds[which],
            self.offsets[which],
        )


class ChainRunReader:
    """The chain of an image, open to be asked where things lie.

    Attributes:
        size: Bytes of the disk.
        files: The chain's files as they were named, the image itself first.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Ask layers that are open."""
        self._layers = [
            QedRunReader(layer) if isinstance(layer, QedLayer) else RawRunReader(layer)
            for layer in layers
        ]
        self.size = self._layers[0].size
        self.files = [cast("PosixFile", layer.file).path for layer in layers]

    async def batches(
        self, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[ChainRuns, None]:
        """Give the extents of a range, in order, each as long as it can be."""
        end = self.size if length is None else min(self.size, start + length)
        kept: ChainRuns | None = None
        while start < end:
            batch = await self.read(start, end)
            start = batch.end
            if kept is not None:
                batch = _joined(_after(kept, batch))
            kept = batch.part(slice(-1, None))
            if len(batch) > 1:
                yield batch.part(slice(None, -1))
        if kept is not None:
            yield kept

    async def read(self, start: int, end: int) -> ChainRuns:
        """Ask layer after layer how it stores a range, or the beginning of it."""
        await trio.lowlevel.checkpoint()
        runs = await self._layers[0].read(start, end)
        depths = np.zeros(len(runs.starts), np.int64)
        size = self.size
        for depth, layer in enumerate(self._layers[1:], 1):
            absent = np.flatnonzero(runs.kinds == UNALLOCATED)
            if not len(absent):
                break
            first = int(runs.starts[absent[0]])
            last = int(absent[-1]) + 1
            # What is past the end of one layer is not to be had from those below it.
            size = min(size, layer.size)
            stop = min(size, int(runs.starts[last]) if last < len(runs.starts) else runs.end)
            if first >= stop:
                break
            below = await layer.read(first, stop)
            runs, depths = _laid_over(runs, depths, below, depth, short=below.end < stop)
        lengths = np.diff(runs.starts, append=runs.end)
        return _joined(ChainRuns(runs.starts, lengths, depths, runs.kinds, runs.offsets))


def _laid_over(
    above: Runs, depths: Array, below: Runs, depth: int, *, short: bool
) -> tuple[Runs, Array]:
    """Let a layer show through where those above it have nothing.

    With ``short`` the layer has not told all; what it has not told about is left out.
    """
    starts = np.union1d(above.starts, np.append(below.starts, below.end))
    end = min(above.end, below.end) if short else above.end
    starts = starts[starts < end]
    upper = np.searchsorted(above.starts, starts, "right") - 1
    lower = np.searchsorted(below.starts, starts, "right") - 1
    through = (above.kinds[upper] == UNALLOCATED) & (lower >= 0) & (starts < below.end)
    kinds = np.where(through, below.kinds[lower], above.kinds[upper])
    offsets = np.where(
        through,
        below.offsets[lower] + _within(below, lower, starts),
        above.offsets[upper] + _within(above, upper, starts),
    )
    return Runs(starts, kinds, offsets, end), np.where(through, depth, depths[upper])


def _within(runs: Runs, numbers: NDArray[np.intp], starts: Array) -> Array:
    """Tell how far into their runs some guest offsets are; 0 where it does not matter."""
    placed = (runs.kinds[numbers] == DATA) | (runs.kinds[numbers] == HOLE)
    return np.where(placed, starts - runs.starts[numbers], 0)


def _after(first: ChainRuns, second: ChainRuns) -> ChainRuns:
    """Put one batch behind another."""
    return ChainRuns(
        np.concatenate((first.starts, second.starts)),
        np.concatenate((first.lengths, second.lengths)),
        np.concatenate((first.depths, second.depths)),
        np.concatenate((first.kinds, second.kinds)),
        np.concatenate((first.offsets, second.offsets)),
    )


def _joined(batch: ChainRuns) -> ChainRuns:
    """Join neighbours that are stored as one."""
    same = (batch.kinds[1:] == batch.kinds[:-1]) & (batch.depths[1:] == batch.depths[:-1])
    placed = (batch.kinds == DATA) | (batch.kinds == HOLE)
    follows = batch.offsets[:-1] + batch.lengths[:-1] == batch.offsets[1:]
    same &= ~placed[1:] | follows
    same &= batch.kinds[1:] != BAD
    if not same.any():
        return batch
    first = np.concatenate(([0], np.flatnonzero(~same) + 1))
    starts = batch.starts[first]
    end = batch.starts[-1] + batch.lengths[-1]
    return ChainRuns(
        starts,
        np.diff(starts, append=end),
        batch.depths[first],
        batch.kinds[first],
        batch.offsets[first],
    )
