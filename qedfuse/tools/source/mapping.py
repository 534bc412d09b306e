"""Where everything on a disk lies, over the whole chain: what ``qemu-img map`` tells.

The chain is asked piece by piece, as much as some pieces of tables describe at a time, so
that a disk of any size takes little memory.  Everything is done on arrays.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np
import trio

from qedfuse.disk.lookup.backing import open_bases, read_header
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import NotQedError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign, is_qed
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS, QedRuns, RawRuns, Runs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer

    Array = NDArray[np.int64]

Format: TypeAlias = Literal["auto", "qed", "raw"]


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A range of the disk that is stored in one way; offsets and lengths in bytes.

    Attributes:
        depth: How far down the chain; 0 is the image itself.
        present: Whether a layer says what is there; else it is zeros because none does.
        zero: Whether it reads as zeros without a look at the file.
        data: Whether the file holds data for it.
        offset: Where in the file of that layer; None if nowhere.
        bad: Whether a table entry is wrong, so that nobody can tell what is there.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    bad: bool = False


@dataclass(slots=True)
class Batch:
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

    def entries(self) -> Iterator[MapEntry]:
        """Give the extents one by one."""
        columns = (self.starts, self.lengths, self.depths, self.kinds, self.offsets)
        for start, length, depth, kind, offset in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            yield MapEntry(
                start,
                length,
                depth,
                present=kind != UNALLOCATED,
                zero=kind in (UNALLOCATED, ZEROS, HOLE),
                data=kind == DATA,
                offset=offset if kind in (DATA, HOLE) else None,
                bad=kind == BAD,
            )

    def count_bad(self) -> int:
        """Tell how many of them nobody can tell anything about."""
        return int((self.kinds == BAD).sum())

    def part(self, which: slice) -> Batch:
        """Give some of the extents."""
        return Batch(
            self.starts[which],
            self.lengths[which],
            self.depths[which],
            self.kinds[which],
            self.offsets[which],
        )


class Map:
    """The chain of an image, open to be asked where things lie.

    Attributes:
        size: Bytes of the disk.
        files: The chain's files as they were named, the image itself first.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Ask layers that are open."""
        self._layers = [
            QedRuns(layer) if isinstance(layer, QedLayer) else RawRuns(layer) for layer in layers
        ]
        self.size = self._layers[0].size
        self.files = [cast("PosixFile", layer.file).path for layer in layers]

    async def batches(
        self, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Give the extents of a range, in order, each as long as it can be."""
        end = self.size if length is None else min(self.size, start + length)
        kept: Batch | None = None
        while start < end:
            batch = await self.piece(start, end)
            start = batch.end
            if kept is not None:
                batch = _joined(_after(kept, batch))
            kept = batch.part(slice(-1, None))
            if len(batch) > 1:
                yield batch.part(slice(None, -1))
        if kept is not None:
            yield kept

    async def piece(self, start: int, end: int) -> Batch:
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
        return _joined(Batch(runs.starts, lengths, depths, runs.kinds, runs.offsets))


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


def _after(first: Batch, second: Batch) -> Batch:
    """Put one batch behind another."""
    return Batch(
        np.concatenate((first.starts, second.starts)),
        np.concatenate((first.lengths, second.lengths)),
        np.concatenate((first.depths, second.depths)),
        np.concatenate((first.kinds, second.kinds)),
        np.concatenate((first.offsets, second.offsets)),
    )


def _joined(batch: Batch) -> Batch:
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
    return Batch(
        starts,
        np.diff(starts, append=end),
        batch.depths[first],
        batch.kinds[first],
        batch.offsets[first],
    )


@asynccontextmanager
async def open_map(
    path: str, image_format: Format = "auto", options: OpenOptions | None = None
) -> AsyncIterator[Map]:
    """Open an image and its chain for reading, to see where things lie.

    Raises:
        NotQedError: It is of a foreign format, or not QED though it was said to be.
        QedError: The image or a base cannot be opened, locked or trusted.
    """
    options = options or OpenOptions()
    file = PosixFile.open(path)
    layers: list[Layer] = []
    try:
        if options.lock:
            mode = LockMode.SHARE if options.force_share else LockMode.READ
            lock_image(file.fd, mode, file.name)
        start = await file.pread(0, SIGNATURE_BYTES)
        found = foreign(start)
        if image_format == "auto" and found is not None:
            msg = f"{file.name}: found a {found} image, expected QED or raw"
            raise NotQedError(msg)
        if image_format == "qed" or (image_format == "auto" and is_qed(start)):
            header = await read_header(file)
            store = make_store(options.cache_bytes)
            layer = QedLayer(file, header, store)
            await layer.scan_l1()
            layers = [layer, *await open_bases(path, file, header, options, store)]
        else:
            layers = [RawLayer(file)]
        yield Map(layers)
    finally:
        for opened in layers[1:]:
            opened.file.close()
        file.close()


async def map_image(
    path: str,
    image_format: Format = "auto",
    options: OpenOptions | None = None,
    *,
    start: int = 0,
    length: int | None = None,
) -> list[MapEntry]:
    """List the extents of a range of a disk; for disks that do not have millions of them.

    Raises:
        QedError: As `open_map`.
    """
    entries: list[MapEntry] = []
    async with (
        open_map(path, image_format, options) as found,
        aclosing(found.batches(start, length)) as batches,
    ):
        async for batch in batches:
            entries.extend(batch.entries())
    return entries
