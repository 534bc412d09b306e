"""Reading, judging and writing the persistent free list (docs/format-extensions.md).

An image is hostile input, and so is its list: it is believed only if every checksum is
right and nothing in it contradicts the header, the file or the tables.  What is read is
bounded by what the file really holds and by `MAX_RUNS`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.space.allocator import MAX_FREE
from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.ondisk.freelist import (
    CLUSTER_HEADER_BYTES,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_END,
    DESCRIPTOR_OFFSET,
    RUN_BYTES,
    BadListError,
    Descriptor,
    build_cluster,
    build_descriptor,
    encode_runs,
    is_descriptor_place,
    parse_cluster_header,
    parse_descriptor,
    parse_runs,
    refuse,
    runs_in_cluster,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.freelist import Runs
    from qedfuse.ondisk.header import Header

    Values = NDArray[np.uint64]

MAX_RUNS: Final = 1 << 20
"""Most runs in a list: with more, a scan of the tables is as quick as reading the list."""

_STEP: Final = 1 << 16
"""Runs, or tables, that are handled at once."""


@dataclass(frozen=True, slots=True)
class FreeList:
    """A list that was found good.

    Attributes:
        runs: The runs, ascending: first cluster, and how many.
        places: The clusters that hold the list, ascending.
        descriptor: The sector that describes it.
    """

    runs: Runs
    places: Values
    descriptor: bytes

    @property
    def clusters(self) -> int:
        """How many clusters are listed."""
        return int(self.runs[:, 1].sum())

    def holds(self, clusters: Values) -> NDArray[np.bool_]:
        """Tell which of some clusters are listed."""
        first, count = self.runs[:, 0], self.runs[:, 1]
        place = np.searchsorted(first, clusters, "right") - 1
        return (place >= 0) & (clusters - first[place] < count[place])


async def read_list(file: HostFile, header: Header, tables: Values) -> FreeList:
    """Read the list of an image that has the bit set.

    Args:
        file: The image.
        header: Its header.
        tables: The file offsets of all its L2 tables, ascending.

    Raises:
        CorruptImageError: The list must not be used; the message says why.
        HostError: The host cannot read the file.
    """
    try:
        return await _Reader(file, header, tables).read()
    except BadListError as error:
        msg = f"{file.name}: free list: {error}"
        raise CorruptImageError(msg) from error


class _Reader:
    """One list being read."""

    def __init__(self, file: HostFile, header: Header, tables: Values) -> None:
        self._file = file
        self._header = header
        self._tables = tables
        self._size = file.size()
        self._bits = header.geometry.cluster_bits
        self._clusters = self._size >> self._bits

    async def read(self) -> FreeList:
        """Read the list and judge it."""
        if self._header.need_check:
            # Whoever set it changed the image while the list said that it was at rest.
            refuse("header field features", "NEED_CHECK set as well", "it clear")
        if name_in_the_way(self._header):
            refuse("descriptor", "the backing file name over it", "a place of its own")
        sector = await self._file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES)
        descriptor = parse_descriptor(sector)
        self._judge_descriptor(descriptor)
        places, parts = await self._read_chain(descriptor)
        runs = np.concatenate(parts)
        if zlib.crc32(encode_runs(runs)) != descriptor.list_crc:
            refuse("runs", "another checksum", "that of the descriptor")
        self._judge_runs(runs, descriptor)
        await self._judge_tables(runs)
        places_held = np.array(places, np.uint64) >> np.uint64(self._bits)
        found = FreeList(runs, places_held, bytes(sector))
        listed = found.holds(found.places)
        if not listed.all():
            stray = places[int(np.argmin(listed))]
            refuse("list cluster", f"one at {stray} that is not listed", "a free one")
        return found

    def _judge_descriptor(self, descriptor: Descriptor) -> None:
        """Judge the numbers, before anything is sized from them."""
        free = min(self._clusters, MAX_FREE)
        for what, found, least, most in (
            ("file_bytes", descriptor.file_bytes, self._size, self._size),
            ("runs", descriptor.runs, 1, MAX_RUNS),
            ("list_clusters", descriptor.list_clusters, 1, descriptor.runs),
            ("free_clusters", descriptor.free_clusters, descriptor.runs, free),
        ):
            if not least <= found <= most:
                expected = f"{least} to {most}" if least < most else f"{least}"
                refuse(f"descriptor {what}", found, expected)

    async def _read_chain(self, descriptor: Descriptor) -> tuple[list[int], list[Runs]]:
        """Read the list clusters; each lies behind the one before it, so there are no loops."""
        places: list[int] = []
        parts: list[Runs] = []
        offset, before, left = descriptor.first_cluster, 0, descriptor.runs
        for _ in range(descriptor.list_clusters):
            self._judge_place(offset, before)
            head = await self._file.pread(offset, CLUSTER_HEADER_BYTES)
            cluster = parse_cluster_header(head, self._header.cluster_size)
            if cluster.runs > left:
                refuse("runs in a list cluster", cluster.runs, f"at most {left}")
            left -= cluster.runs
            length = CLUSTER_HEADER_BYTES + cluster.runs * RUN_BYTES
            parts.append(parse_runs(cluster, await self._file.pread(offset, length)))
            places.append(offset)
            before, offset = offset, cluster.next_cluster
            await trio.lowlevel.checkpoint()
        if left or offset:
            found = f"{descriptor.runs - left} runs, then a list cluster at {offset}"
            refuse("list", found, f"{descriptor.runs} runs and no more")
        return places, parts

    def _judge_place(self, offset: int, before: int) -> None:
        """Judge the place of a list cluster, given that of the one before it."""
        least = max(self._header.header_end, before + 1)
        most = self._size - self._header.cluster_size
        if self._header.geometry.in_cluster(offset) or not least <= offset <= most:
            expected = f"a multiple of {self._header.cluster_size} from {least} to {most}"
            refuse("list cluster offset", offset, expected)

    def _judge_runs(self, runs: Runs, descriptor: Descriptor) -> None:
        """Judge whether the runs are in order, apart, and inside the file."""
        first, count = runs[:, 0], runs[:, 1]
        # In this order nothing can overflow: a first cluster below the file's end comes
        # before a count that leaves the run inside it.  No run reaches that end: the
        # file was cut there, so its last cluster was in use.
        inside = first < np.uint64(self._clusters)
        inside[inside] = count[inside] < np.uint64(self._clusters) - first[inside]
        inside &= (first >= self._header.header_end >> self._bits) & (count > 0)
        if not inside.all():
            self._refuse(
                runs, ~inside, f"a run before cluster {self._clusters - 1}, the file's last"
            )
        apart = first[1:] > first[:-1] + count[:-1]
        if not apart.all():
            expected = "runs that ascend and do not touch each other"
            self._refuse(runs[1:], ~apart, expected)
        total = int(count.sum())
        if total != descriptor.free_clusters:
            refuse("runs", f"{total} clusters", f"{descriptor.free_clusters}")
        l1_table = np.array([self._header.l1_table_offset], np.uint64)
        self._judge_overlap(runs, l1_table, "the L1 table")

    async def _judge_tables(self, runs: Runs) -> None:
        """Judge whether an L2 table lies in a run."""
        for start in range(0, len(self._tables), _STEP):
            self._judge_overlap(runs, self._tables[start : start + _STEP], "an L2 table")
            await trio.lowlevel.checkpoint()

    def _judge_overlap(self, runs: Runs, tables: Values, what: str) -> None:
        first = tables >> np.uint64(self._bits)
        # The last run that begins before the end of the table.
        size = np.uint64(self._header.table_size)
        place = np.searchsorted(runs[:, 0], first + size, "left") - 1
        within = (place >= 0) & (runs[place, 0] + runs[place, 1] > first)
        if within.any():
            found = f"{what} at {int(tables[np.argmax(within)])} among the free clusters"
            refuse("runs", found, "none there")

    def _refuse(self, runs: Runs, bad: NDArray[np.bool_], expected: str) -> None:
        """Refuse the list for the first run that is bad."""
        first, count = runs[np.argmax(bad)].tolist()
        refuse("runs", f"{count} clusters from cluster {first} on", expected)


def name_in_the_way(header: Header) -> bool:
    """Tell whether the backing file name lies where the descriptor has to be."""
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    return header.has_backing and start < DESCRIPTOR_END and end > DESCRIPTOR_OFFSET


async def refuse_taken_place(file: HostFile, header: Header) -> None:
    """Refuse to keep a list in an image that has something else in the descriptor's place.

    Raises:
        UsageError: It has.
    """
    where = f"bytes {DESCRIPTOR_OFFSET} to {DESCRIPTOR_END - 1} of the header's cluster"
    found = ""
    if name_in_the_way(header):
        found = "the backing file name"
    elif not header.free_list and not is_descriptor_place(
        await file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES)
    ):
        # Whoever put it there without a feature bit of ours may need it.
        found = "something else"
    if found:
        msg = f"{file.name}: free list: found {found} in {where}, expected them to be unused"
        raise UsageError(msg)


async def write_list(file: HostFile, header: Header, runs: Runs) -> None:
    """Write list and descriptor; once they are durable the bit may be set.

    The list needs no space of its own: it lies in the lowest free clusters.  There are
    always enough, since each run has at least one.  Nobody reads any of this while the
    bit is clear, so the order of these writes does not matter; only the bit must come
    after a datasync that covers them all.

    Args:
        file: The image, exactly as long as its last cluster in use asks for.
        header: Its header, with the bit clear.
        runs: The free clusters, at least one and at most `MAX_RUNS` runs.

    Raises:
        HostError: The host refused; the image is as good as without a list.
    """
    each = runs_in_cluster(header.cluster_size)
    places = _lowest(runs, -(-len(runs) // each)) << np.uint64(header.geometry.cluster_bits)
    offsets = [*places.tolist(), 0]
    for number, offset in enumerate(offsets[:-1]):
        part = runs[number * each : (number + 1) * each]
        await file.pwrite(offset, build_cluster(offsets[number + 1], part))
    descriptor = Descriptor(
        first_cluster=offsets[0],
        list_clusters=len(places),
        runs=len(runs),
        free_clusters=int(runs[:, 1].sum()),
        file_bytes=file.size(),
        list_crc=zlib.crc32(encode_runs(runs)),
    )
    await file.pwrite(DESCRIPTOR_OFFSET, build_descriptor(descriptor))


def _lowest(runs: Runs, count: int) -> Values:
    """Give the lowest ``count`` clusters of some runs; there are that many."""
    few = runs[:count].copy()
    np.minimum(few[:, 1], np.uint64(count), out=few[:, 1])
    return members(few)[:count]


def members(runs: Runs) -> Values:
    """List each cluster of some runs."""
    counts = runs[:, 1].astype(np.int64)
    ends = np.cumsum(counts)
    within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    return np.repeat(runs[:, 0], counts) + within.astype(np.uint64)


async def erase_descriptor(file: HostFile, header: Header) -> None:
    """Wipe the descriptor of a list that has become invalid, as a second line of defence.

    Not needed for safety as long as everybody keeps the order: the bit is set only after
    a datasync that covers a new descriptor, so an old one is never believed again, also
    if a crash loses this write.
    """
    if not name_in_the_way(header):
        await file.pwrite(DESCRIPTOR_OFFSET, bytes(DESCRIPTOR_BYTES))
