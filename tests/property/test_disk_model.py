"""Random requests in random order, on images of random geometry, agree with a bytearray.

Each machine counts which paths its requests took; a fixture fails if a path was never taken.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest
import trio
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.ondisk.constants import SECTOR, ZERO
from qedfuse.ondisk.geometry import Geometry
from qedfuse.ondisk.header import build_header
from tests.support import qemu
from tests.support.disks import (
    WRITABLE,
    build_image,
    difference,
    guest_bytes,
    header_of,
    inspect_image,
    opened,
    pattern,
    sector_ceil,
)
from tests.support.eventloop import EventLoopThread, HeldContext
from tests.support.hostfiles import MemoryFile
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.disk import Disk

CACHE_BYTES = (0, 20_000, 1 << 20)
"""Budgets of the table cache: for no slice, for a few, for all."""

cluster_sizes = st.sampled_from([4096, 8192, 65536])
table_sizes = st.sampled_from([1, 2, 4, 16])
fractions = st.floats(0, 1, width=32)
lengths = st.one_of(
    st.integers(1, 700), st.sampled_from([512, 4096, 4097, 8192, 65536]), st.integers(1, 150_000)
)


def fitting_size(size: int, cluster_size: int, table_size: int) -> int:
    """Return a size in whole sectors that the geometry allows and a model in memory can mirror."""
    return min(sector_ceil(size), Geometry(cluster_size, table_size).max_image_size, 9 << 20)


class DiskMachine(RuleBasedStateMachine):
    """A disk of random shape over a random chain, and a bytearray with its expected content.

    Attributes:
        taken: How often each path was taken, by all machines together.
    """

    taken: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        """Start an event loop; `start` opens the disk."""
        super().__init__()
        self.loop = EventLoopThread()
        self.held: HeldContext | None = None
        self.serial = 0

    @initialize(
        cluster_size=cluster_sizes,
        table_size=table_sizes,
        header_size=st.integers(1, 3),
        # Beyond 2 MiB a disk of 4 KiB clusters and tables of one cluster has several tables.
        size=st.one_of(st.integers(0, 40_000), st.integers(0, 5 << 20)),
        layers=st.lists(st.tuples(st.integers(0, 3 << 20), st.integers(0, 9)), max_size=3),
        zeros=st.sets(st.integers(0, 60), max_size=6),
        data=st.sets(st.integers(0, 60), max_size=6),
        budget=st.sampled_from(CACHE_BYTES),
        detect_zeroes=st.sampled_from(["off", "on", "unmap"]),
        discard=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        cluster_size: int,
        table_size: int,
        header_size: int,
        size: int,
        layers: list[tuple[int, int]],
        zeros: set[int],
        data: set[int],
        budget: int,
        detect_zeroes: Literal["off", "on", "unmap"],
        *,
        discard: bool,
    ) -> None:
        """Build the chain, the lowest image first, and open it."""
        self.bases: list[bytes] = []
        below = b""
        for level, (length, seed) in enumerate(layers):
            length = sector_ceil(length)  # noqa: PLW2901
            if not level:
                # A raw base may have any length; QED bases have whole sectors.
                below = pattern(max(0, length - seed), seed)
                self.bases.insert(0, below)
                continue
            clusters: dict[int, bytes | int] = {
                number: ZERO if number % 3 else pattern(4096, seed + number)
                for number in range(seed, 40, 5)
            }
            base = build_image(length, clusters, backing=b"below")
            below = guest_bytes(base, below)
            self.bases.insert(0, bytes(base))
        size = fitting_size(size, cluster_size, table_size)
        inside = [number for number in zeros | data if number * cluster_size < size]
        image = build_image(
            size,
            {
                number: ZERO if number in zeros else pattern(cluster_size, number)
                for number in sorted(inside)
            },
            cluster_size=cluster_size,
            table_size=table_size,
            header_size=header_size,
            backing=b"base" if layers else b"",
        )
        self.geometry = Geometry(cluster_size, table_size)
        self.below = below
        self.model = bytearray(guest_bytes(image, below))
        self.options = replace(
            WRITABLE, cache_bytes=budget, detect_zeroes=detect_zeroes, discard=discard
        )
        self.content = bytes(image)
        self.longest = len(image)
        self.open()

    def open(self) -> None:
        """Open the disk on the content that the last close has left."""
        self.file = MemoryFile(self.content)
        self.held = HeldContext(self.loop, opened(self.file, self.bases, self.options))
        self.disk: Disk = self.held.value

    def close(self) -> None:
        """Close the disk, and check the image file and the disk's content."""
        assert self.held is not None
        held, self.held = self.held, None
        held.leave()
        self.content = bytes(self.file.content)
        found = inspect_image(self.content)
        assert found.errors == ()
        assert not any(self.content[at] for at in found.leaked), "free clusters are punched out"
        last = len(self.content) - self.geometry.cluster_size
        assert last not in found.leaked, "the file does not end with a free cluster"
        assert not header_of(self.content).need_check
        assert difference(guest_bytes(self.content, self.below), self.model) is None

    def offset_at(self, fraction: float, *, aligned: bool) -> int:
        """Return the guest offset at a fraction of the disk."""
        start = int(fraction * len(self.model))
        return start - start % self.geometry.cluster_size if aligned else start

    def fresh(self, length: int) -> bytes:
        """Return data that differs from that of every other write."""
        self.serial += 1
        return pattern(length, self.serial)

    @precondition(lambda self: len(self.model) > 0)
    @rule(fraction=fractions, length=lengths, aligned=st.booleans(), cached=st.booleans())
    def write(self, fraction: float, length: int, *, aligned: bool, cached: bool) -> None:
        """Write, perhaps past the end; by the fast path if the file is cached and that takes it."""
        start = min(self.offset_at(fraction, aligned=aligned), len(self.model) - 1)
        expected = min(length, len(self.model) - start)
        data = self.fresh(length)
        if not self.try_write(start, data, cached=cached):
            assert self.loop.run(self.disk.write, start, data) == expected
        self.model[start : start + expected] = data[:expected]

    @precondition(lambda self: len(self.model) > 0)
    @rule(fraction=fractions, length=st.integers(1, 9000), times=st.integers(2, 4))
    def overwrite(self, fraction: float, length: int, times: int) -> None:
        """Write to a range several times, from the second time on by the fast path if possible.

        The first write allocates the clusters and loads their tables.
        """
        start = self.offset_at(fraction, aligned=False)
        length = min(length, len(self.model) - start)
        for number in range(times):
            data = self.fresh(length)
            if not self.try_write(start, data, cached=bool(number)):
                assert self.loop.run(self.disk.write, start, data) == length
            self.model[start : start + length] = data

    def try_write(self, start: int, data: bytes, *, cached: bool) -> bool:
        """Write by the fast path; False, without a change, if that does not take the write."""

        async def write() -> bool:
            self.file.in_page_cache = cached
            fast = self.disk.try_write(start, data)
            self.file.in_page_cache = False
            return fast

        fast = self.loop.run(write)
        if cached:
            self.taken["fast write" if fast else "write left to the slow path"] += 1
        return fast

    @precondition(lambda self: len(self.model) > 0)
    @rule(fraction=fractions, clusters=st.integers(1, 40), aligned=st.booleans())
    def write_zeros(self, fraction: float, clusters: int, *, aligned: bool) -> None:
        """Write zeros, which may become zero clusters."""
        start = min(self.offset_at(fraction, aligned=aligned), len(self.model) - 1)
        length = min(clusters * self.geometry.cluster_size // 2, len(self.model) - start)
        self.loop.run(self.disk.write, start, bytes(length))
        self.model[start : start + length] = bytes(length)

    @precondition(lambda self: len(self.model) > 0)
    @rule(fraction=fractions, length=lengths | st.integers(1, 5 << 20), aligned=st.booleans())
    def discard(self, fraction: float, length: int, *, aligned: bool) -> None:
        """Discard, perhaps past the end."""
        start = self.offset_at(fraction, aligned=aligned)
        before = self.disk.statistics().quarantined_clusters
        self.loop.run(self.disk.discard, start, length)
        self.taken["discard"] += self.disk.statistics().quarantined_clusters > before
        length = min(length, len(self.model) - start)
        self.model[start : start + length] = bytes(length)

    @precondition(lambda self: len(self.model) > 0)
    @rule(fraction=fractions, length=lengths)
    def allocate(self, fraction: float, length: int) -> None:
        """Allocate a range; it reads as before."""
        start = self.offset_at(fraction, aligned=False)
        self.loop.run(self.disk.allocate, start, length)
        length = min(length, len(self.model) - start)
        for extent in self.loop.run(self.disk.extents, start, length):
            assert (extent.kind, extent.depth) == (Kind.DATA, 0)

    @rule()
    def discard_all(self) -> None:
        """Discard the whole disk: after a flush only tables are in use."""
        self.loop.run(self.disk.ensure_scanned)
        self.loop.run(self.disk.discard, 0, len(self.model))
        self.model[:] = bytes(len(self.model))
        self.loop.run(self.disk.flush)
        statistics = self.disk.statistics()
        assert statistics.quarantined_clusters == 0
        if self.options.discard:
            header = header_of(self.file.content)
            tables = 1 + self.geometry.l1_used(header.image_size)
            used = header.header_end + tables * self.geometry.table_bytes
            free = (statistics.free_clusters or 0) * self.geometry.cluster_size
            assert statistics.file_bytes - free <= used

    @rule(fraction=fractions, length=lengths, aligned=st.booleans())
    def read(self, fraction: float, length: int, *, aligned: bool) -> None:
        """Read, perhaps past the end; by the slow path, and by the fast path if that takes it."""
        start = self.offset_at(fraction, aligned=aligned)
        expected = self.model[start : start + length]

        async def read() -> None:
            assert difference(await self.disk.read(start, length), expected) is None
            # The tables are in memory now, as far as the budget allows.
            self.file.in_page_cache = True
            fast = self.disk.try_read(start, length)
            self.file.in_page_cache = False
            self.taken["read left to the slow path" if fast is None else "fast read"] += 1
            assert fast is None or difference(bytes(fast), expected) is None

        self.loop.run(read)

    @rule()
    def read_all(self) -> None:
        """Read the whole disk."""
        got = self.loop.run(self.disk.read, 0, len(self.model) + 1000)
        assert difference(got, self.model) is None

    @rule()
    def flush(self) -> None:
        """Flush; the file then holds the content of the disk."""
        self.loop.run(self.disk.flush)
        assert difference(guest_bytes(self.file.content, self.below), self.model) is None
        assert inspect_image(self.file.content).errors == ()

    @rule()
    def reopen(self) -> None:
        """Close the disk and open it again."""
        self.close()
        self.open()

    @rule(more=st.integers(0, 1 << 20), odd=st.booleans())
    def grow(self, more: int, *, odd: bool) -> None:
        """Grow the disk; added bytes are zeros, also over a longer base."""
        size = len(self.model) + (more if odd else more // 65536 * 65536)
        size = max(
            len(self.model),
            fitting_size(size, self.geometry.cluster_size, self.geometry.table_size),
        )
        self.taken["growth"] += size > len(self.model)
        self.loop.run(self.disk.grow, size)
        self.model.extend(bytes(size - len(self.model)))
        assert self.disk.size == size

    @precondition(lambda self: len(self.model) > 0)
    @rule(
        fraction=fractions,
        parts=st.lists(
            st.tuples(st.integers(0, 12_000), st.integers(1, 9_000)), min_size=2, max_size=8
        ),
        flush=st.booleans(),
        discards=st.lists(st.tuples(st.integers(0, 12_000), st.integers(1, 20_000)), max_size=3),
    )
    def write_concurrently(
        self,
        fraction: float,
        parts: list[tuple[int, int]],
        discards: list[tuple[int, int]],
        *,
        flush: bool,
    ) -> None:
        """Write and discard concurrently; each byte comes from one of these, or is unchanged."""
        start = self.offset_at(fraction, aligned=True)
        writes = [
            (start + offset, bytes([number + 1]) * length)
            for number, (offset, length) in enumerate(parts)
            if start + offset < len(self.model)
        ]

        async def batch() -> None:
            async with trio.open_nursery() as nursery:
                for at, data in writes:
                    nursery.start_soon(self.disk.write, at, data)
                for offset, length in discards:
                    nursery.start_soon(self.disk.discard, start + offset, length)
                if flush:
                    nursery.start_soon(self.disk.flush)
                nursery.start_soon(self.disk.read, start, 20_000)

        self.loop.run(batch)
        self.taken["concurrent writes"] += len(writes) > 1
        ends = [at + len(data) for at, data in writes]
        end = max([start, *ends, *(start + at + length for at, length in discards)])
        got = self.loop.run(self.disk.read, start, end - start)
        for index, byte in enumerate(got):
            writers = {data[0] for at, data in writes if at <= start + index < at + len(data)}
            writers |= {0 for at, length in discards if at <= index < at + length}
            assert byte in (writers or {self.model[start + index]}), start + index
        self.model[start : start + len(got)] = got

    @rule()
    def extents(self) -> None:
        """Extents cover the disk without gaps, and only data extents hold data."""
        at = 0
        for extent in self.loop.run(self.disk.extents, 0, len(self.model)):
            self.taken[f"extent of kind {extent.kind.name}, depth {min(extent.depth, 1)}"] += 1
            assert extent.start == at
            assert extent.length > 0
            assert extent.kind is not Kind.BAD
            at = extent.end
            if extent.kind is not Kind.DATA:
                assert not any(self.model[extent.start : extent.end])
        assert at == len(self.model)

    @invariant()
    def cache_is_bounded(self) -> None:
        """Check that the table cache stays within its budget, except for pinned slices."""
        if self.held is not None:
            # At most six slices are pinned by one write or one cycle; 300 bytes each for the
            # objects around them.
            slack = 6 * (min(65536, self.geometry.table_bytes) + 300)
            statistics = self.disk.statistics().tables
            assert statistics.total_bytes <= self.options.cache_bytes + slack

    @invariant()
    def file_is_bounded(self) -> None:
        """Check that the file stays within its bound."""
        if self.held is not None:
            header = header_of(self.file.content)
            bound = self.geometry.bound(header.header_end, header.image_size)
            assert self.file.size() <= max(bound, self.longest)

    def teardown(self) -> None:
        """Close the disk, and show QEMU one image in eight, chosen by its content."""
        try:
            if self.held is not None:
                self.close()
                digest = hashlib.sha256(self.content).digest()
                if digest[0] % 8 == 0:
                    ask_qemu(self.content)
        finally:
            self.loop.stop()


def ask_qemu(content: bytes) -> None:
    """Let QEMU check an image, without its backing name: QEMU would open that file."""
    header = header_of(content)
    image = build_header(replace(header, features=0)) + content[64:]
    if header.table_size == 1:
        return  # QEMU refuses to open images with tables of one cluster
    descriptor = os.memfd_create("image")
    try:
        os.write(descriptor, image)
        DiskMachine.taken["checked by QEMU"] += 1
        result = qemu.check(f"/proc/{os.getpid()}/fd/{descriptor}")
        note(result.text)
        assert result.errors == 0
    finally:
        os.close(descriptor)


PATHS = (
    "fast write",
    "write left to the slow path",
    "fast read",
    "read left to the slow path",
    "discard",
    "growth",
    "concurrent writes",
    "extent of kind DATA, depth 0",
    "extent of kind ZERO, depth 0",
    "checked by QEMU",
)
"""The paths that the requests of a run must take."""


@pytest.fixture(scope="module", autouse=True)
def _every_path_is_taken() -> Iterator[None]:
    """Fail if the machines of this run have never taken one of the `PATHS`."""
    yield
    missing = [path for path in PATHS if not DiskMachine.taken[path]]
    assert not missing or not DiskMachine.taken, f"never: {missing}; taken: {DiskMachine.taken}"


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(
    max_examples=share(100, of=300),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# --- large geometries, in sparse files ------------------------------------------------

LARGE_GEOMETRIES = [
    # cluster size, table size, disk size
    (64 << 20, 16, 64 << 40),
    (64 << 20, 16, (1 << 63) - 512),
    (64 << 20, 1, 1 << 62),
    (64 << 10, 4, 64 << 40),
    (1 << 20, 8, 1 << 60),
    (4 << 10, 16, 256 << 30),
]


@pytest.mark.parametrize(("cluster_size", "table_size", "size"), LARGE_GEOMETRIES)
async def test_far_offsets(tmp_path: Path, cluster_size: int, table_size: int, size: int) -> None:
    """A few writes far apart read back after a reopen, with little memory and disk space."""
    path = str(tmp_path / "far.qed")
    await create_image(path, size, cluster_size=cluster_size, table_size=table_size)
    span = Geometry(cluster_size, table_size).table_span
    # The ends of the disk, its middle, and across the end of a table.
    starts = {0, size // 3 + 12345, size // 2 + 77, size - 900}
    starts |= {span - 50} if span < size else set()
    written = {start: pattern(900, start % 97) for start in starts}
    options = OpenOptions(writable=True, lock=False, cache_bytes=1 << 20)
    tracemalloc.start()
    try:
        async with open_disk(path, options) as disk:
            assert disk.size == size
            async with trio.open_nursery() as nursery:
                for start, data in written.items():
                    nursery.start_soon(disk.write, start, data)
        async with open_disk(path, replace(options, writable=False)) as disk:
            for start in written:
                before, after = min(start, 3000), 3000
                got = await disk.read(start - before, before + after)
                expected = expected_around(written, start - before, size, before + after)
                assert difference(got, expected) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A slice of 64 KiB for each write and its copies, beside numpy's and trio's own objects;
    # a whole table of these geometries has up to 1 GiB.
    assert peak < 24 << 20
    # Data and zeros around it, in at most five clusters of which only the written blocks are
    # allocated, and the blocks of the tables.
    used = Path(path).stat().st_blocks * 512  # noqa: ASYNC240  nothing runs beside it
    assert used < 40 << 20
    if cluster_size < 1 << 22:  # QEMU overflows with larger clusters
        assert qemu.check(path).code == 0


def expected_around(written: dict[int, bytes], start: int, size: int, length: int) -> bytes:
    """Return what a range of an otherwise empty disk holds."""
    result = bytearray(max(0, min(length, size - start)))
    for at, data in written.items():
        for index, byte in enumerate(data):
            if 0 <= at + index - start < len(result):
                result[at + index - start] = byte
    return bytes(result)


@settings(max_examples=60, deadline=None)
@given(
    cluster_bits=st.integers(12, 26),
    table_size=st.sampled_from([1, 2, 4, 8, 16]),
    fraction=fractions,
    length=st.integers(1, 5000),
)
async def test_any_geometry(
    cluster_bits: int, table_size: int, fraction: float, length: int
) -> None:
    """On a disk of any legal geometry and its largest size, a write anywhere reads back."""
    geometry = Geometry(1 << cluster_bits, table_size)
    size = geometry.max_image_size
    start = min(int(fraction * size), size - length) if fraction < 1 else size - length
    data: Any = pattern(length, cluster_bits)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/image.qed"
        await create_image(path, size, cluster_size=1 << cluster_bits, table_size=table_size)
        options = OpenOptions(writable=True, lock=False)
        async with open_disk(path, options) as disk:
            assert await disk.write(start, data) == length
            await disk.flush()
            assert await disk.read(start, length) == data
        async with open_disk(path) as disk:
            low = max(0, start - SECTOR)
            assert await disk.read(low, start - low + length) == bytes(start - low) + data
