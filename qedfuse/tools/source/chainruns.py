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
    """Adjacent runs of a chain, as arrays of one length.

    Attributes:
        starts: Guest offset of each run.
        lengths: Bytes of the disk.
        depths: Layer that stores each run; 0 is the image itself.
        kinds: As in `Runs`.
        offsets: As in `Runs`, in the file of the layer.
    """

    starts: Array
    lengths: Array
    depths: Array
    kinds: NDArray[np.uint8]
    offsets: Array

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.starts)

    @property
    def end(self) -> int:
        """Guest offset where the last run ends."""
        return int(self.starts[-1] + self.lengths[-1])

    def count_bad(self) -> int:
        """Return the number of runs whose table entry is invalid."""
        return int((self.kinds == BAD).sum())

    def slice_of(self, which: slice) -> ChainRuns:
        """Return a slice of the runs."""
        return ChainRuns(
            self.starts[which],
            self.lengths[which],
            self.depths[which],
            self.kinds[which],
            self.offsets[which],
        )


class ChainRunReader:
    """Reads how the layers of an open chain store the disk.

    Attributes:
        size: Bytes of the disk.
        files: Paths of the chain's files as they were named, the image itself first.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Read open layers, the image itself first."""
        self._layers = [
            QedRunReader(layer) if isinstance(layer, QedLayer) else RawRunReader(layer)
            for layer in layers
        ]
        self.size = self._layers[0].size
        self.files = [cast("PosixFile", layer.file).path for layer in layers]

    async def batches(
        self, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[ChainRuns, None]:
        """Yield the runs of a range in order, each as long as possible also across batches."""
        end = self.size if length is None else min(self.size, start + length)
        last: ChainRuns | None = None  # may continue in the next batch
        while start < end:
            batch = await self.read(start, end)
            start = batch.end
            if last is not None:
                batch = _joined(_concatenated(last, batch))
            last = batch.slice_of(slice(-1, None))
            if len(batch) > 1:
                yield batch.slice_of(slice(None, -1))
        if last is not None:
            yield last

    async def read(self, start: int, end: int) -> ChainRuns:
        """Return how the chain stores a range, or the beginning of it; never empty."""
        await trio.lowlevel.checkpoint()
        runs = await self._layers[0].read(start, end)
        depths = np.zeros(len(runs.starts), np.int64)
        size = self.size
        for depth, layer in enumerate(self._layers[1:], 1):
            unallocated = np.flatnonzero(runs.kinds == UNALLOCATED)
            if not len(unallocated):
                break
            first = int(runs.starts[unallocated[0]])
            last = int(unallocated[-1]) + 1
            # Past the end of a layer the layers below it do not show through.
            size = min(size, layer.size)
            stop = min(size, int(runs.starts[last]) if last < len(runs.starts) else runs.end)
            if first >= stop:
                break
            below = await layer.read(first, stop)
            runs, depths = _overlaid(runs, depths, below, depth, short=below.end < stop)
        lengths = np.diff(runs.starts, append=runs.end)
        return _joined(ChainRuns(runs.starts, lengths, depths, runs.kinds, runs.offsets))


def _overlaid(
    above: Runs, depths: Array, below: Runs, depth: int, *, short: bool
) -> tuple[Runs, Array]:
    """Return the runs of some layers combined with those of the layer below them.

    Args:
        above: Runs of the upper layers.
        depths: The layer of each.
        below: Runs of the lower layer, where the upper ones are unallocated.
        depth: The lower layer.
        short: Whether ``below`` covers only a part of the range; the result then ends with
            it.
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
        below.offsets[lower] + _offset_within(below, lower, starts),
        above.offsets[upper] + _offset_within(above, upper, starts),
    )
    return Runs(starts, kinds, offsets, end), np.where(through, depth, depths[upper])


def _offset_within(runs: Runs, numbers: NDArray[np.intp], starts: Array) -> Array:
    """Return how far into its run each guest offset is; 0 for a run without a file offset."""
    has_offset = (runs.kinds[numbers] == DATA) | (runs.kinds[numbers] == HOLE)
    return np.where(has_offset, starts - runs.starts[numbers], 0)


def _concatenated(first: ChainRuns, second: ChainRuns) -> ChainRuns:
    """Return two adjacent batches as one."""
    return ChainRuns(
        np.concatenate((first.starts, second.starts)),
        np.concatenate((first.lengths, second.lengths)),
        np.concatenate((first.depths, second.depths)),
        np.concatenate((first.kinds, second.kinds)),
        np.concatenate((first.offsets, second.offsets)),
    )


def _joined(runs: ChainRuns) -> ChainRuns:
    """Return the runs with those joined that continue each other in one file."""
    joins = (runs.kinds[1:] == runs.kinds[:-1]) & (runs.depths[1:] == runs.depths[:-1])
    has_offset = (runs.kinds == DATA) | (runs.kinds == HOLE)
    follows = runs.offsets[:-1] + runs.lengths[:-1] == runs.offsets[1:]
    joins &= ~has_offset[1:] | follows
    joins &= runs.kinds[1:] != BAD
    if not joins.any():
        return runs
    first = np.concatenate(([0], np.flatnonzero(~joins) + 1))
    starts = runs.starts[first]
    end = runs.starts[-1] + runs.lengths[-1]
    return ChainRuns(
        starts,
        np.diff(starts, append=end),
        runs.depths[first],
        runs.kinds[first],
        runs.offsets[first],
    )
