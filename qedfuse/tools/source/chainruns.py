"""How a whole chain stores a range of the disk, as arrays: the runs of each layer combined.

Where the upper layers store nothing, the disk reads as the layer below them.  One call
returns at most the range that a few reads of tables describe, so a disk of any size takes
little memory.  All work is done on whole arrays.
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
        lengths: Length of each run in bytes.
        depths: Number of the layer that stores each run; 0 is the image itself.
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
        """Return the number of `BAD` runs; each is the range of one invalid table entry."""
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
        files: Paths by which the chain's files were opened, the image itself first.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Read ``layers``, the image itself first, which the caller has opened and closes."""
        self._layers = [
            QedRunReader(layer) if isinstance(layer, QedLayer) else RawRunReader(layer)
            for layer in layers
        ]
        self.size = self._layers[0].size
        self.files = [cast("PosixFile", layer.file).path for layer in layers]

    async def batches(
        self, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[ChainRuns, None]:
        """Yield the runs of a range of the disk in order, in batches.

        Adjacent runs are joined also where one batch ends and the next begins.

        Args:
            start: Guest offset in bytes.
            length: Bytes; None for all up to the end of the disk.
        """
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
        """Return the runs from ``start`` on, up to ``end`` or an earlier offset; never empty."""
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
            # Past its end a layer reads as zeros, even where the layers below it are longer.
            size = min(size, layer.size)
            stop = min(size, int(runs.starts[last]) if last < len(runs.starts) else runs.end)
            if first >= stop:
                break
            below = await layer.read(first, stop)
            is_partial = below.end < stop
            runs, depths = _overlaid(runs, depths, below, depth, below_is_partial=is_partial)
        lengths = np.diff(runs.starts, append=runs.end)
        return _joined(ChainRuns(runs.starts, lengths, depths, runs.kinds, runs.offsets))


def _overlaid(
    above: Runs, depths: Array, below: Runs, depth: int, *, below_is_partial: bool
) -> tuple[Runs, Array]:
    """Combine the runs of the upper layers with those of the next layer below.

    Args:
        above: Runs of the upper layers.
        depths: Number of the layer that stores each run of ``above``.
        below: Runs of the lower layer, from the first to the last range that is unallocated
            in ``above``.
        depth: Number of the lower layer.
        below_is_partial: Whether ``below`` ends before that range does, because one call
            returns a limited number of runs.  The result then ends where ``below`` ends.

    Returns:
        The combined runs, and the number of the layer that stores each.
    """
    starts = np.union1d(above.starts, np.append(below.starts, below.end))
    end = min(above.end, below.end) if below_is_partial else above.end
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
    """Return the distance in bytes of each guest offset from the start of its run.

    The distance is 0 if the run has no file offset.

    Args:
        runs: The runs.
        numbers: Index of the run of each guest offset.
        starts: The guest offsets.
    """
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
    """Return the runs, with adjacent ones joined if they have the same layer and kind.

    Runs with file offsets are joined only if they are also adjacent in the file.  `BAD` runs
    stay separate, so that each invalid entry is counted.
    """
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
