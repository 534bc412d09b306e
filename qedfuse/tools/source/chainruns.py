"""How a whole chain stores a range of the disk, as arrays: the runs of each layer combined.

Where the upper layers store nothing, the disk reads as the next layer below.  For speed, numpy
processes whole arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import trio

from qedfuse.disk.lookup.foreignopening import is_foreign
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, QedRunReader, RawRunReader, Runs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer

    Array = NDArray[np.int64]


@dataclass(slots=True)
class ChainRuns:
    """Adjacent runs of a chain, as arrays of equal length; never empty.

    Attributes:
        starts: Guest offset of each run in bytes.
        lengths: Length of each run in bytes.
        depths: Depth of the layer that stores each run; 0 is the image itself.  If no layer
            stores the run, the last depth that was searched.
        kinds: `UNALLOCATED`, `ZEROS`, `DATA`, `HOLE` or `BAD` for each run.
        offsets: An offset in bytes for each run, by the kind of the run:

            - `DATA` and `HOLE`: the offset of the run in the file of the layer.  If QEMU serves
              the layer (`ChainRunReader.unknown_depths`), the guest offset of the run.
            - `BAD`: the guest offset where the range of the invalid entry begins.
            - Other kinds: meaningless.
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
        """Guest offset in bytes where the last run ends."""
        return int(self.starts[-1] + self.lengths[-1])

    def count_bad(self) -> int:
        """Return the number of `BAD` runs; one invalid entry can give several."""
        return int((self.kinds == BAD).sum())

    def slice_of(self, which: slice) -> ChainRuns:
        """Return the runs whose indices a slice selects."""
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
        unknown_depths: Depths of the layers that QEMU serves.  The offsets of their runs are guest
            offsets, because their file offsets are not known.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Make a reader of open layers, which the caller must close later.

        Args:
            layers: The chain, the image itself first; `scan_l1` of each QED layer was called.
        """
        self._readers = [
            QedRunReader(layer) if isinstance(layer, QedLayer) else RawRunReader(layer)
            for layer in layers
        ]
        self.size = self._readers[0].size
        self.files = [layer.file.path for layer in layers]
        self.unknown_depths = [depth for depth, layer in enumerate(layers) if is_foreign(layer)]

    async def batches(
        self, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[ChainRuns, None]:
        """Yield the runs of a range of the disk in order, in batches.

        No run is split between two batches.

        Args:
            start: Guest offset in bytes where the range begins.
            length: Length of the range in bytes, cut off at the end of the disk; None for the
                rest of the disk.

        Raises:
            HostError: The host cannot read a file.
        """
        end = self.size if length is None else min(self.size, start + length)
        last: ChainRuns | None = None  # the last run, which may continue in the next batch
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
        """Return the runs from ``start`` on, up to ``end`` or an earlier offset.

        The range must lie within the disk and not be empty.  The result has at least one run.

        Args:
            start: Guest offset in bytes where the runs begin.
            end: Guest offset in bytes where the runs end at the latest.

        Raises:
            HostError: The host cannot read a file.
        """
        await trio.lowlevel.checkpoint()
        runs = await self._readers[0].read(start, end)
        depths = np.zeros(len(runs.starts), np.int64)
        size = self.size
        for depth, reader in enumerate(self._readers[1:], 1):
            unallocated = np.flatnonzero(runs.kinds == UNALLOCATED)
            if not len(unallocated):
                break
            first = int(runs.starts[unallocated[0]])
            last = int(unallocated[-1]) + 1
            # A layer reads as zeros past its end, even where lower layers are longer.  So no layer
            # is searched past the end of a layer above it.
            size = min(size, reader.size)
            stop = min(size, int(runs.starts[last]) if last < len(runs.starts) else runs.end)
            if first >= stop:
                break
            below = await reader.read(first, stop)
            is_partial = below.end < stop
            runs, depths = _overlaid(runs, depths, below, depth, below_is_partial=is_partial)
        lengths = np.diff(runs.starts, append=runs.end)
        return _joined(ChainRuns(runs.starts, lengths, depths, runs.kinds, runs.offsets))


def _overlaid(
    above: Runs, depths: Array, below: Runs, depth: int, *, below_is_partial: bool
) -> tuple[Runs, Array]:
    """Combine the runs of the upper layers with those of the next layer below, of depth ``depth``.

    ``below`` begins at the first unallocated run of ``above``.  It ends with the last unallocated
    run, or earlier where a layer ends.  With ``below_is_partial`` it ends even earlier, because a
    reader returns a limited number of runs; then the result ends there, too.
    """
    end = min(above.end, below.end) if below_is_partial else above.end
    starts = np.concatenate((above.starts, below.starts, [below.end]))
    starts = np.sort(starts[starts < end])
    # Drop repeated starts.  np.union1d would import numpy.ma, which takes longer than the copy of a
    # small disk.
    starts = starts[np.diff(starts, prepend=-1) != 0]
    upper = np.searchsorted(above.starts, starts, "right") - 1
    lower = np.searchsorted(below.starts, starts, "right") - 1
    # The runs that the upper layers do not store and the lower layer describes.
    is_below = (above.kinds[upper] == UNALLOCATED) & (lower >= 0) & (starts < below.end)
    kinds = np.where(is_below, below.kinds[lower], above.kinds[upper])
    offsets = np.where(
        is_below,
        below.offsets[lower] + _offset_within(below, lower, starts),
        above.offsets[upper] + _offset_within(above, upper, starts),
    )
    return Runs(starts, kinds, offsets, end), np.where(is_below, depth, depths[upper])


def _offset_within(runs: Runs, indices: NDArray[np.intp], starts: Array) -> Array:
    """Return how far each guest offset is from its run's start; 0 if the run has no file offset.

    ``indices`` has for each guest offset the index of the run that contains it.
    """
    has_offset = (runs.kinds[indices] == DATA) | (runs.kinds[indices] == HOLE)
    return np.where(has_offset, starts - runs.starts[indices], 0)


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
    """Return the runs, with adjacent runs joined if they have the same layer and kind.

    Runs with file offsets must also be adjacent in the file, and `BAD` runs must belong to the same
    invalid entry.
    """
    joins = (runs.kinds[1:] == runs.kinds[:-1]) & (runs.depths[1:] == runs.depths[:-1])
    has_offset = (runs.kinds == DATA) | (runs.kinds == HOLE)
    follows = runs.offsets[:-1] + runs.lengths[:-1] == runs.offsets[1:]
    joins &= ~has_offset[1:] | follows
    joins &= (runs.kinds[1:] != BAD) | (runs.offsets[:-1] == runs.offsets[1:])
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
