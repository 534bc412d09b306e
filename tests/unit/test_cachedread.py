"""Reads that the extension answers by itself from memory (``_cachedread.c``)."""

from __future__ import annotations

import os
import random
from array import array
from contextlib import ExitStack, closing
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.space.epochs import Epochs
from qedfuse.hostio.pagesource import CheckedUnits, PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.residency import Residency
from qedfuse.hostio.systemcalls import inline_flags
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.handles import HANDLE_SYNC, HANDLE_WRITER
from qedfuse.mount.fuse.requestcounters import READ, WRITE, RequestCounters
from tests.support.fusewire import session_of
from tests.support.readsession import BITS, CLUSTER, CLUSTERS, INODE, Session, Tables
from tests.support.refusedcalls import CACHESTAT, MINCORE, run_without

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qedfuse.disk.disk import Disk

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)


LONG_BITS = 16
LONG = 1 << LONG_BITS
"""Bytes of a read that is spliced."""


@pytest.fixture
def session() -> Iterator[Session]:
    """Make a session, and end it."""
    with session_of(Session()) as made:
        yield made


@pytest.fixture
def tables(tmp_path: Path, session: Session) -> Iterator[Tables]:
    """Let the extension answer reads of an image."""
    made = Tables(tmp_path / "file")
    session.show(*made.arguments())
    yield made
    made.close()


@pytest.fixture
def zero_blocks() -> memoryview:
    """Give the blocks of zeros that are known, for all units but the last."""
    return memoryview(bytearray(8 * CLUSTERS)).cast("Q")


@pytest.fixture
def ready(
    tmp_path: Path, session: Session, tables: Tables, zero_blocks: memoryview
) -> Iterator[bytearray]:
    """Show the file by units of a cluster, with one byte more; give which units may be read."""
    may_read = bytearray(b"\1" * (CLUSTERS + 1))
    path = tmp_path / "units"
    path.write_bytes(tables.content + b"\0")

    def forget(first: int, last: int) -> None:
        may_read[first : last + 1] = bytes(last + 1 - first)

    lengths = (len(tables.content), len(tables.content) + 1)
    with path.open("rb") as file, closing(Residency(file.fileno(), lengths[1])) as residency:
        units = CheckedUnits(may_read, zero_blocks, BITS, *lengths, residency.address, forget)
        source = PageSource(tables.policy, file.fileno(), units)
        session.show(*tables.arguments()[:4], (source,), *tables.arguments()[5:])
        yield may_read


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 1), (5, 100), (CLUSTER - 1, 2), (0, 4 * CLUSTER), (5 * CLUSTER + 7, 2 * CLUSTER)],
)
def test_a_run_within_a_slice_is_answered(
    start: int, size: int, session: Session, tables: Tables
) -> None:
    """A read of clusters that follow each other in the file gets the bytes of the file."""
    expected = tables.content[CLUSTER + start : CLUSTER + start + size]
    assert session.read(start, size) == expected
    assert session.read(start, size, INODE | HANDLE_WRITER) == expected


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (0, 0),
        (3 * CLUSTER, 2 * CLUSTER),
        (7 * CLUSTER, CLUSTER + 1),
        (8 * CLUSTER, 1),
        (1 << 62, CLUSTER),
    ],
    ids=["empty", "two slices", "across the end", "past the end", "far past the end"],
)
def test_a_range_that_is_no_run_is_passed_on(
    start: int, size: int, session: Session, tables: Tables
) -> None:
    """A range that is empty, in two slices, or not within the disk goes to the function."""
    assert tables.policy.is_inline
    assert session.read(start, size) is None


def test_answered_reads_are_counted(session: Session, tables: Tables) -> None:
    """Each answered read counts once, with its bytes, for the disk and for one file."""
    counters = RequestCounters()
    session.count(counters)
    tables.slices["key", 0].entries[3] = 0
    tables.slices["codes", 0].entries[3] = (3 * CLUSTER) | 3
    for _ in range(20):
        assert session.read(0, 100) is not None
    assert session.read(3 * CLUSTER, 7) == tables.base_content[3 * CLUSTER : 3 * CLUSTER + 7]
    assert session.read(CLUSTERS * CLUSTER, 8) is None, "passed on, so it is counted elsewhere"
    found = counters.statistics(READ)
    assert (found.requests, found.bytes, found.fast, found.errors) == (21, 2007, 21, 0)
    assert sum(found.histogram) == 21
    assert 0 < found.seconds < 20
    assert counters.statistics(WRITE).requests == 0
    assert tables.file_reads.tolist() == [20, 2000, 1, 7]


def test_one_of_sixteen_reads_is_timed(session: Session, tables: Tables) -> None:  # noqa: ARG001  shows a view
    """The time of the first of 16 reads counts for the 15 that follow it."""
    counters = RequestCounters()
    session.count(counters)
    times = [0.0]
    for _ in range(34):
        session.read(0, 8)
        times.append(counters.statistics(READ).seconds)
    steps = [round(1e9 * (after - before)) for before, after in pairwise(times)]
    assert len({*steps[:16]}) == len({*steps[16:32]}) == len({*steps[32:]}) == 1
    assert min(steps) > 0
    assert len({*steps}) > 1, "the first read of the next 16 is timed"


def test_arrays_of_another_length_are_refused(session: Session) -> None:  # noqa: ARG001  makes a session
    """The extension counts in no array that does not have its number of cells."""
    assert extraops._extension is not None
    with pytest.raises(ValueError, match="another number of cells"):
        extraops._extension.set_counters(2, (array("Q", bytes(8)),))


@pytest.mark.parametrize("entry", [0, 1, 5 * CLUSTER])
def test_entries_that_are_no_run_are_passed_on(
    entry: int, session: Session, tables: Tables
) -> None:
    """An unallocated cluster, one of zeros, or one elsewhere in the file ends a run."""
    tables.slices["key", 0].entries[1] = entry
    assert session.read(0, 2 * CLUSTER) is None
    assert session.read(0, CLUSTER) == tables.content[CLUSTER : 2 * CLUSTER]
    content = tables.content[entry : entry + 8]
    assert session.read(CLUSTER, 8) == (content if entry > 1 else None)


def test_a_run_does_not_continue_at_the_beginning_of_its_slice(
    session: Session, tables: Tables
) -> None:
    """A range in two slices is passed on also if the first slice begins with the next cluster."""
    tables.slices["key", 0].entries[0] = 5 * CLUSTER
    tables.slices["key", 1].entries[0] = 1
    assert session.read(3 * CLUSTER, 2 * CLUSTER) is None


def test_a_cluster_of_a_backing_file_is_answered(session: Session, tables: Tables) -> None:
    """A range within one unallocated cluster gets the bytes of the base that holds the cluster."""
    tables.slices["key", 0].entries[:] = array("Q", bytes(4 * 8))
    expected = tables.base_content[3 * CLUSTER + 5 : 3 * CLUSTER + 105]
    assert session.read(2 * CLUSTER + 5, 100) == expected
    assert session.read(2 * CLUSTER + 5, CLUSTER) is None, "two clusters"
    assert session.read(0, CLUSTER) is None, "mixed"
    assert session.read(CLUSTER, CLUSTER) is None, "zeros"
    assert session.read(3 * CLUSTER, CLUSTER) is None, "a depth that the chain does not have"
    codes = tables.slices["codes", 0].entries
    codes[3] = codes[2] + CLUSTER
    expected_run = tables.base_content[3 * CLUSTER + 5 : 4 * CLUSTER + 5]
    assert session.read(2 * CLUSTER + 5, CLUSTER) == expected_run, "contiguous in one file"
    tables.slices["key", 0].entries[3] = CLUSTER
    assert session.read(2 * CLUSTER + 5, CLUSTER) is None, "two clusters that look like a run"
    tables.slices["key", 0].entries[2] = 1
    assert session.read(2 * CLUSTER + 5, 100) is None, "a cluster of zeros hides the base"
    tables.slices["key", 0].entries[2] = 0
    tables.base_policy.is_inline = False
    assert session.read(2 * CLUSTER + 5, 100) is None, "the policy of the base"
    tables.base_policy.is_inline = True
    assert session.read(2 * CLUSTER + 5, 100) == expected
    del tables.slices["codes", 0]
    assert session.read(2 * CLUSTER + 5, 100) is None, "codes that are not in memory"


def evict(tables: Tables) -> None:
    """Take the slice out of the table cache."""
    del tables.slices["key", 0]


def forget_key(tables: Tables) -> None:
    """Forget under which key the slice is cached."""
    tables.keys.clear()


def find_bad(tables: Tables) -> None:
    """Let the slice have an invalid entry."""
    tables.slices["key", 0].bad = bytes(4)


def shrink(tables: Tables) -> None:
    """Give the disk another header, with a smaller size."""
    tables.layer.header = SimpleNamespace(image_size=CLUSTER - 1)


def miss(tables: Tables) -> None:
    """Stop trying reads inline."""
    tables.policy.is_inline = False


def fail(tables: Tables) -> None:
    """Let the lookup of the size raise."""
    del tables.layer.header


@pytest.mark.parametrize("change", [evict, forget_key, find_bad, shrink, miss, fail])
def test_each_read_sees_the_present_state(
    change: Any,  # noqa: ANN401  one of the functions above
    session: Session,
    tables: Tables,
) -> None:
    """What changes between two reads counts for the second one: nothing is remembered."""
    assert session.read(0, CLUSTER) == tables.content[CLUSTER : 2 * CLUSTER]
    change(tables)
    assert session.read(0, CLUSTER) is None


def test_a_file_that_ends_early_is_passed_on(
    session: Session, tables: Tables, tmp_path: Path
) -> None:
    """If the file has fewer bytes than the read, the function gets the read."""
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(2 * CLUSTER - 1)
    assert session.read(0, CLUSTER) is None
    assert session.read(0, CLUSTER - 1) == tables.content[CLUSTER : 2 * CLUSTER - 1]


def test_only_units_that_are_ready_are_answered(
    session: Session, tables: Tables, ready: bytearray
) -> None:
    """A read of several units is answered while all of them may be read."""
    expected = tables.content[CLUSTER + 5 : 4 * CLUSTER + 5]
    tables.slices["key", 0].entries[3] = 4 * CLUSTER
    for unit in (1, 2, 3, 4):
        assert session.read(5, 3 * CLUSTER) == expected
        ready[unit] = 0
        assert session.read(5, 3 * CLUSTER) is None
        ready[unit] = 1
    ready[:] = bytes(len(ready))
    assert session.read(5, 1) is None


def test_a_block_of_zeros_may_be_a_hole(
    session: Session, tables: Tables, ready: bytearray, tmp_path: Path
) -> None:
    """A read of zeros, or of a block of zeros, is passed on, and its units are forgotten."""
    tables.slices["key", 0].entries[3] = 4 * CLUSTER
    expected = bytearray(tables.content[CLUSTER : 4 * CLUSTER])
    with (tmp_path / "units").open("r+b") as file:
        for start, length, is_hole in (
            *((0, 4096, True), (CLUSTER, 4096, True), (2 * CLUSTER - 4096, 4096, True)),
            *((1, 4096, False), (CLUSTER + 1, 4095, False), (0, 4095, False), (0, 1, False)),
        ):
            zeroed = bytearray(expected)
            zeroed[start : start + length] = bytes(length)
            os.pwrite(file.fileno(), zeroed, CLUSTER)
            assert session.read(0, 3 * CLUSTER) == (None if is_hole else zeroed)
            assert list(ready[1:4]) == [not is_hole] * 3
            ready[:] = b"\1" * len(ready)
            assert session.read(start, min(length, 100)) is None
            assert ready[0] == 1
            assert not ready[1 + start // CLUSTER]
            ready[:] = b"\1" * len(ready)


def test_a_block_of_zeros_that_is_known_is_answered(
    session: Session, ready: bytearray, zero_blocks: memoryview, tmp_path: Path
) -> None:
    """A read of zeros is answered if all blocks of zeros in it are known."""
    with (tmp_path / "units").open("r+b") as file:
        file.write(bytes((CLUSTERS + 1) * CLUSTER))
    zero_blocks[2] = 1
    assert session.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert session.read(CLUSTER + 100, 5) == bytes(5)
    assert session.read(CLUSTER + 100, CLUSTER) is None, "the next block is not known"
    ready[:] = b"\1" * len(ready)
    zero_blocks[3] = 2
    assert session.read(CLUSTER + 100, CLUSTER) is None, "another bit"
    ready[:] = b"\1" * len(ready)
    zero_blocks[3] = 3
    assert session.read(CLUSTER + 100, CLUSTER) == bytes(CLUSTER)
    assert session.read((CLUSTERS - 1) * CLUSTER, 1) is None, "past the known units"


@pytest.mark.parametrize("openers", [1, 2])
def test_a_file_with_units_is_read_only_from_memory(
    openers: int, session: Session, tables: Tables, tmp_path: Path
) -> None:
    """Whether one or several use the file, a read brings nothing from the disk into memory."""
    path = tmp_path / "units"
    length = len(tables.content)
    path.write_bytes(tables.content + bytes(openers))
    forgotten: list[tuple[int, int]] = []
    with path.open("rb") as file, closing(Residency(file.fileno(), length + openers)) as residency:

        def show(address: int) -> None:
            may_read = bytearray(b"\1" * (CLUSTERS + 1))
            units = CheckedUnits(
                *(may_read, memoryview(b""), BITS, length, length + 1, address),
                lambda first, last: forgotten.append((first, last)),
            )
            source = PageSource(tables.policy, file.fileno(), units)
            session.show(*tables.arguments()[:4], (source,), *tables.arguments()[5:])

        show(residency.address)
        assert session.read(5, 8000) == tables.content[CLUSTER + 5 : CLUSTER + 8005]
        assert not forgotten
        assert run_without(CACHESTAT, lambda: session.read(5, 8000)) is not None
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not residency.has_range(CLUSTER, 1):  # not in a file system in memory
            for _ in range(3):
                assert session.read(5, 8000) is None
            assert not residency.has_range(CLUSTER, 1)
            assert set(forgotten) == {(1, 2)}
            assert run_without(CACHESTAT, lambda: session.read(5, 8000)) is None
            assert not residency.has_range(CLUSTER, 1)
        path.write_bytes(tables.content + bytes(openers))
        show(0)
        assert session.read(5, 8000) is not None
        assert run_without(CACHESTAT, lambda: session.read(5, 8000)) is None


class LongUnits:
    """A file with three units of 64 KiB in a session that splices, each a cluster of the disk.

    Attributes:
        content: The content of the units.
        file: The file, open for writing.
        ready: Which units may be read.
    """

    def __init__(self, path: Path, session: Session, cleanup: ExitStack) -> None:
        """Write the file, and let the extension answer reads of it; ``cleanup`` closes it."""
        self.content = random.Random("units").randbytes(3 * LONG)
        path.write_bytes(self.content + b"\0")
        self.file = cleanup.enter_context(path.open("r+b"))
        self.ready = bytearray(b"\1" * 3)
        self._session = session
        fd = self.file.fileno()
        residency = cleanup.enter_context(closing(Residency(fd, 3 * LONG + 2)))
        units = CheckedUnits(
            *(self.ready, memoryview(b""), LONG_BITS, 3 * LONG, 3 * LONG + 1, residency.address),
            lambda first, last: self.ready.__setitem__(
                slice(first, last + 1), bytes(last + 1 - first)
            ),
        )
        layer = SimpleNamespace(header=SimpleNamespace(image_size=2 * LONG))
        entries = SimpleNamespace(bad=None, entries=array("Q", [LONG, 2 * LONG]))
        source = PageSource(ReadPolicy(), fd, units)
        reads = array("Q", bytes(16))
        view = (layer, {0: 0}, {0: entries}.get, None, (source,), LONG_BITS, 1, Epochs(), reads)
        session.show(*view)

    def read(self) -> bool:
        """Return whether a read of the second unit is answered, which must be by splicing."""
        before = self._session.wire.spliced
        data = self._session.read(0, LONG)
        assert data in (None, self.content[LONG : 2 * LONG])
        assert self._session.wire.spliced - before == (data is not None)
        return data is not None

    def write_back(self) -> None:
        """Wait until the pages are written."""
        os.fsync(self.file.fileno())

    def settle(self) -> None:
        """Read until the extension has found that the pages of the second unit are written."""
        for _ in range(8):
            assert self.read()
        assert list(self.ready) == [1, 2, 1]


@pytest.fixture
def long_units(tmp_path: Path) -> Iterator[LongUnits]:
    """Show a file with units from which reads are spliced."""
    with ExitStack() as cleanup, session_of(Session(can_splice=True)) as session:
        yield LongUnits(tmp_path / "long", session, cleanup)


def test_a_unit_is_settled_when_its_pages_are_written(long_units: LongUnits) -> None:
    """Until then, and without cachestat(2), each read asks whether the pages are valid."""
    for _ in range(20):
        # The kernel, or a sync(1) of another program, may write pages at any time.
        os.pwrite(long_units.file.fileno(), long_units.content[-LONG - 1 : -LONG], 2 * LONG - 1)
        assert long_units.read()
    assert list(long_units.ready) == [1, 1, 1], "a page waits to be written"
    long_units.write_back()
    assert run_without(CACHESTAT, lambda: [long_units.read() for _ in range(20)]) == [True] * 20
    assert list(long_units.ready) == [1, 1, 1]
    long_units.settle()
    assert long_units.read()


def test_a_settled_unit_that_leaves_the_page_cache_is_passed_on(long_units: LongUnits) -> None:
    """A settled unit is not read from the disk, and is compared again."""
    long_units.write_back()
    long_units.settle()
    with closing(Residency(long_units.file.fileno(), 3 * LONG)) as residency:
        os.posix_fadvise(long_units.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not residency.has_range(LONG, LONG):  # not in a file system in memory
            assert not long_units.read()
            assert not residency.has_range(LONG, LONG)
            assert list(long_units.ready) == [1, 0, 1]


def test_a_settled_unit_is_checked_again_when_another_process_joins(long_units: LongUnits) -> None:
    """A process that may write the unit makes it count as not settled."""
    long_units.write_back()
    long_units.settle()
    os.truncate(long_units.file.fileno(), 3 * LONG + 2)
    assert not long_units.read()
    long_units.ready[1] = 2
    assert long_units.read()
    assert not run_without(MINCORE, long_units.read)
    assert list(long_units.ready) == [1, 0, 1]
    long_units.ready[1] = 1
    for _ in range(20):
        assert long_units.read()
    assert list(long_units.ready) == [1, 1, 1]


def test_a_settled_unit_needs_no_look_at_its_pages(long_units: LongUnits) -> None:
    """A read of a settled unit does without mincore(2), which the others need."""
    long_units.write_back()
    assert not run_without(MINCORE, long_units.read)
    long_units.ready[1] = 1
    long_units.settle()
    assert run_without(MINCORE, long_units.read)


def test_a_long_read_of_a_file_that_was_cut_is_passed_on(long_units: LongUnits) -> None:
    """A spliced read is not answered if the file has another length than before."""
    assert long_units.read()
    os.truncate(long_units.file.fileno(), 3 * LONG)
    assert not long_units.read()
    assert list(long_units.ready) == [1, 0, 1]


def test_a_reader_at_the_end_of_a_unit_is_passed_on_if_more_must_be_fetched(
    session: Session, tables: Tables, ready: bytearray
) -> None:
    """A read to the end of its unit is answered only if all is ready that may follow."""
    assert session.read(0, CLUSTER) == tables.content[CLUSTER : 2 * CLUSTER]
    ready[CLUSTERS] = 0
    assert session.read(0, CLUSTER) is None
    assert session.read(0, CLUSTER - 1) == tables.content[CLUSTER : 2 * CLUSTER - 1]
    assert session.read(CLUSTER - 1, 2) is None
    ready[CLUSTERS] = 1
    last = tables.content[-CLUSTER:]
    assert session.read((CLUSTERS - 1) * CLUSTER, CLUSTER) == last, "the last unit"


def test_bytes_past_the_content_are_passed_on(
    session: Session, tables: Tables, ready: bytearray
) -> None:
    """The byte that a file has after its content is not read."""
    assert all(ready)
    tables.slices["key", 0].entries[0] = CLUSTERS * CLUSTER
    assert session.read(0, CLUSTER) == tables.content[-CLUSTER:]
    tables.slices["key", 0].entries[0] = (CLUSTERS + 1) * CLUSTER
    assert session.read(0, 1) is None


def test_a_file_with_units_that_was_cut_is_passed_on(
    session: Session, tables: Tables, ready: bytearray, tmp_path: Path
) -> None:
    """Once the file has another length, nothing of it is answered, present bytes included."""
    assert all(ready)
    assert session.read(0, 8) is not None
    os.truncate(tmp_path / "units", len(tables.content))
    assert session.read(0, 8) is None
    with (tmp_path / "units").open("ab") as file:
        file.write(b"\0")
    assert session.read(0, 8) is None, "the unit was not forgotten"
    ready[1] = 1
    assert session.read(0, 8) is None, "the length has changed since the last look"
    ready[1] = 1
    assert session.read(0, 8) is not None, "the length alone was wrong"


def test_a_read_between_two_valid_lengths_is_passed_on(
    session: Session, tables: Tables, ready: bytearray, tmp_path: Path
) -> None:
    """If another process opens the entry between two reads, the second read does not count.

    That process may have set the length after a cut that it has not seen.
    """
    expected = tables.content[CLUSTER : CLUSTER + 8]
    assert session.read(0, 8) == expected
    for openers in (2, 1):
        os.truncate(tmp_path / "units", len(tables.content) + openers)
        assert session.read(0, 8) is None
        assert not ready[1], "the unit was not forgotten"
        ready[1] = 1
        assert session.read(0, 8) == expected


def test_a_file_in_memory_is_answered(session: Session, tables: Tables) -> None:
    """Reads of a file of tmpfs, which refuses RWF_NOWAIT, are answered too."""
    with open(os.memfd_create("memory"), "w+b") as file:  # noqa: PTH123  opens a descriptor
        file.write(tables.content)
        file.flush()
        source = PageSource(tables.policy, file.fileno(), flags=inline_flags(file.fileno()))
        session.show(*tables.arguments()[:4], (source,), *tables.arguments()[5:])
        assert session.read(5, 100) == tables.content[CLUSTER + 5 : CLUSTER + 105]


def test_a_file_without_a_source_is_passed_on(session: Session, tables: Tables) -> None:
    """Reads of a file that has no source go to the function, those of the other files do not."""
    tables.slices["key", 0].entries[:] = array("Q", [CLUSTER, 0, 0, 0])
    view = tables.arguments()
    files = view[4]
    assert isinstance(files, tuple)
    session.show(*view)
    assert session.read(2 * CLUSTER, 8) == tables.base_content[3 * CLUSTER : 3 * CLUSTER + 8]
    session.show(*view[:4], (files[0], None), *view[5:])
    assert session.read(2 * CLUSTER, 8) is None
    assert session.read(0, 8) == tables.content[CLUSTER : CLUSTER + 8]


def test_a_hit_ends_a_row_of_misses(session: Session, tables: Tables) -> None:
    """After an answer from the page cache the policy has no misses in a row."""
    tables.policy.record_inline_miss()
    assert session.read(0, 8) is not None
    assert tables.policy.misses == 0


@pytest.mark.parametrize("handle", [INODE | HANDLE_SYNC, INODE + 1])
def test_other_handles_are_passed_on(handle: int, session: Session, tables: Tables) -> None:
    """A handle whose reads take the slow path, and one of another disk, go to the function."""
    assert tables.policy.is_inline
    assert session.read(0, 8, handle) is None


def test_after_the_end_of_the_session_no_view_is_used(session: Session, tables: Tables) -> None:
    """The views end with the session."""
    assert session.read(0, 8) is not None
    extraops.end()
    assert extraops._extension is not None
    extraops._extension.set_data_handlers(session._read, None, None)
    assert tables.policy.is_inline
    assert session.read(0, 8) is None


def test_views_are_checked(session: Session) -> None:
    """Something else than a view is refused."""
    assert session.asked == []
    assert extraops._extension is not None
    with pytest.raises(TypeError, match="a value is no ReadView"):
        extraops._extension.set_read_views({INODE: object()}, 0)


async def change(disk: Disk, rng: random.Random) -> None:
    """Change a disk in a random way."""
    start = rng.randrange(disk.size)
    length = min(rng.choice([512, CLUSTER, 20 * CLUSTER]), disk.size - start)
    match rng.randrange(8):
        case 0:
            await disk.discard(start, length)
        case 1:
            await disk.flush()
        case 2:
            await disk.grow(disk.size + rng.randrange(3) * CLUSTER)
        case 3:
            await disk.compact(within_bound=False)
        case _:
            await disk.write(start, rng.randbytes(length))


async def chain(directory: Path, bases: int, rng: random.Random) -> str:
    """Make an image with a number of backing images that hold random data; return its path."""
    name, path = None, ""
    for number in range(bases + 1):
        path = str(directory / f"{number}.qed")
        await create_image(path, 256 * CLUSTER, cluster_size=CLUSTER, table_size=1, backing=name)
        name = f"{number}.qed"
        if number < bases:
            async with open_disk(path, OpenOptions(writable=True)) as disk:
                for _ in range(60):
                    await change(disk, rng)
    return path


@pytest.mark.parametrize("bases", [0, 2])
@pytest.mark.parametrize("seed", range(5))
async def test_the_extension_and_the_disk_read_the_same(
    seed: int, bases: int, session: Session, tmp_path: Path
) -> None:
    """After any changes of a disk the extension answers exactly the runs that the disk locates."""
    rng = random.Random(seed)
    path = await chain(tmp_path, bases, rng)
    answered = passed = from_base = 0
    # A small budget of the table cache, so that slices are evicted.
    async with open_disk(path, OpenOptions(writable=True, cache_bytes=1 << 16)) as disk:
        found = disk.tables_for_reads()
        session.show(*found)
        assert found.files[0] is not None
        own_fd = found.files[0].fd
        for _ in range(200):
            await change(disk, rng)
            for _ in range(10):
                start = rng.randrange(disk.size)
                size = min(rng.choice([1, 512, CLUSTER, 5 * CLUSTER]), disk.size - start)
                location = disk.try_locate(start, size)
                if location is None:
                    passed += 1
                    assert session.read(start, size) is None
                else:
                    answered += 1
                    from_base += location[0] != own_fd
                    # Reads the range into the page cache, which may have dropped it.
                    expected = await disk.read(start, size)
                    assert session.read(start, size) == expected
    assert answered > 100
    assert passed > 100
    assert (from_base > 50) == (bases > 0)
