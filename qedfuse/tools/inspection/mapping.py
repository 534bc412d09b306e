"""The map of a disk: which layer of the chain stores each range, as listed by ``qemu-img map``."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.foreignopening import foreign_disk
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.hostio.imagefile import read_header
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign_driver
from qedfuse.tools.common.formatprobe import is_qed_image
from qedfuse.tools.source.chainruns import ChainRunReader
from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator

    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.tools.source.chainruns import ChainRuns


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A range of the disk whose bytes are all stored in the same way, by one layer or by none.

    Attributes:
        start: Guest offset of the range in bytes.
        length: Length of the range in bytes.
        depth: Depth of the layer that stores the range, 0 for the image itself.  If no layer does,
            it is the depth of the last layer that was searched.
        present: Whether a layer stores the range, or has an invalid entry for it.  If not, the
            range reads as zeros.
        zero: Whether the tables, or the holes of a raw file, show that the range is all zeros.
        data: Whether the file of a layer holds data for the range; False if ``bad`` is set.
        offset: File offset of the data, or of the hole of a raw file; None for all other ranges,
            and for a layer that QEMU serves.
        bad: Whether the table entry is invalid, so that the content is unknown.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    bad: bool = False


def map_entries(batch: ChainRuns, unknown_depths: Collection[int] = ()) -> Iterator[MapEntry]:
    """Yield the runs of a batch as map entries, in order.

    ``unknown_depths`` are the depths of layers without known file offsets (`ChainRunReader`).
    """
    columns = (batch.starts, batch.lengths, batch.depths, batch.kinds, batch.offsets)
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
            offset=offset if kind in (DATA, HOLE) and depth not in unknown_depths else None,
            bad=kind == BAD,
        )


@asynccontextmanager
async def open_map(
    path: str, image_format: FormatChoice = "auto", options: OpenOptions | None = None
) -> AsyncIterator[ChainRunReader]:
    """Open an image and its chain read-only; yield a reader of the runs of the chain.

    Args:
        path: An image or a raw file, or its URL.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the image and its chain; None for the defaults.

    Raises:
        NotQedError: ``image_format`` is ``qed`` and the file has no QED magic.
        ForeignError: The file must be read by QEMU, which fails or is not installed.
        QedError: The file or a base cannot be opened, locked or read, is invalid or refused.
    """
    options = options or OpenOptions()
    async with open_image(path, options.read_lock, options.remote) as file:
        signature = await file.pread(0, SIGNATURE_BYTES)
        driver = foreign_driver(signature) if image_format == "auto" else None
        if driver is not None:
            async with foreign_disk(file, driver, options) as disk:
                yield ChainRunReader([RawLayer(disk)])
            return
        if not is_qed_image(signature, image_format, file.name):
            yield ChainRunReader([RawLayer(file)])
            return
        header = await read_header(file)
        store = make_store(options.cache_bytes)
        layer = QedLayer(file, header, store)
        # An entry that points into an L2 table is bad, so lookups need the offsets of all tables.
        await layer.scan_l1()
        with closing_layers(await open_bases(path, file, header, options, store)) as bases:
            yield ChainRunReader([layer, *bases])


async def map_image(
    path: str,
    image_format: FormatChoice = "auto",
    options: OpenOptions | None = None,
    *,
    start: int = 0,
    length: int | None = None,
) -> list[MapEntry]:
    """Return the map of a range of a disk as a list in memory, which can be large.

    An invalid L1 or L2 entry does not raise: its range is a `MapEntry` with ``bad`` set.

    Args:
        path: An image or a raw file, or its URL.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the image and its chain; None for the defaults.
        start: Guest offset in bytes where the range begins.
        length: Length of the range in bytes, which is cut off at the end of the disk; None for all.

    Raises:
        QedError: The chain cannot be opened, see `open_map`, or a file cannot be read.
    """
    entries: list[MapEntry] = []
    async with (
        open_map(path, image_format, options) as reader,
        aclosing(reader.batches(start, length)) as batches,
    ):
        async for batch in batches:
            entries.extend(map_entries(batch, reader.unknown_depths))
    return entries
