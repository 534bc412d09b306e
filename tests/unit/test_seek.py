"""lseek(2) with SEEK_DATA and SEEK_HOLE, as the extension itself answers it (``_seek.c``)."""

from __future__ import annotations

import errno
import os
import random
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.options import OpenOptions
from qedfuse.disk.window import DiskWindow
from qedfuse.mount.fuse import extraops
from tests.support.disks import build_image, get_entry, l2_entry_offset, opened, put_entry
from tests.support.fusewire import LSEEK, NODE, session_of
from tests.support.hostfiles import MemoryFile
from tests.support.readsession import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from qedfuse.disk.datapath.readtables import ReadTables
    from qedfuse.disk.disk import Disk
    from qedfuse.mount.fuse._extraops import Request

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

CLUSTER: Final = 4096
TABLE: Final = 512
"""Clusters that one table describes."""
SPAN: Final = TABLE * CLUSTER


class Seeks:
    """Sends lseek requests of the kernel, and keeps what the extension asks Python.

    Attributes:
        is_permitted: What the function returns that is asked whether the extension may answer.
        asked: The argument of each call of that function, the inode.
        passed: The whence and the offset of the requests that the handler got.
    """

    def __init__(self, session: Session) -> None:
        """Send the requests of ``session``."""
        self.is_permitted = True
        self.asked: list[int] = []
        self.passed: list[tuple[int, int]] = []
        self._session = session
        assert extraops._extension is not None
        extraops._extension.set_handler(self._handle, self._may_seek)

    def _may_seek(self, inode: int) -> bool:
        self.asked.append(inode)
        return self.is_permitted

    def _handle(self, request: Request, _name: str, *values: int) -> None:
        _inode, whence, start, _length = values
        self.passed.append((whence, start))
        request.error(errno.ENOTSUP)

    def show(self, tables: ReadTables) -> None:
        """Let the extension use the tables of a disk."""
        self._session.show_all({NODE: tables})

    def seek(self, whence: int, start: int) -> int | None:
        """Return the offset that the extension answers with; None if the handler was asked.

        Raises:
            OSError: The extension has answered with an error.
        """
        self._session.wire.answers.clear()
        self.passed.clear()
        self._session.wire.send(LSEEK, struct.pack("=QqII", 1, start, whence, 0))
        ((_number, error, answer),) = self._session.wire.answers
        if self.passed:
            assert (self.passed, -error) == ([(whence, start)], errno.ENOTSUP)
            return None
        if error:
            raise OSError(-error, os.strerror(-error))
        return int.from_bytes(answer, "little")

    def data(self, start: int) -> int | None:
        """Return the first data at or past an offset; None if the extension has found none.

        The extension must have answered.
        """
        try:
            found = self.seek(os.SEEK_DATA, start)
        except OSError as error:
            assert error.errno == errno.ENXIO  # noqa: PT017  its number is the answer
            return None
        assert found is not None, "the handler was asked"
        return found


@pytest.fixture
def seeks() -> Iterator[Seeks]:
    """Make a session for lseek requests, and end it."""
    with session_of(Session()) as made:
        yield Seeks(made)


@asynccontextmanager
async def shown(
    seeks: Seeks, image: bytes | bytearray, options: OpenOptions | None = None
) -> AsyncIterator[Disk]:
    """Open an image whose tables are all in memory, and let the extension search it."""
    file = MemoryFile(image)
    file.in_page_cache = True
    async with opened(file, options=options or OpenOptions(writable=True)) as disk:
        if options is None:
            await disk.ensure_scanned()  # the scan drops the slices that it has read
        for start in range(0, disk.size, SPAN):
            await disk.next_data(start)
        seeks.show(disk.tables_for_reads())
        yield disk


@pytest.mark.parametrize("seed", range(20))
async def test_a_search_finds_what_python_finds(seed: int, seeks: Seeks) -> None:
    """Data and holes are found in tables that are full, empty, mixed or missing, up to the end."""
    chance = random.Random(seed)
    size = 6 * SPAN - chance.randrange(8) * 512
    clusters: dict[int, bytes | int] = {}
    for table in range(6):
        first = table * TABLE
        kind = chance.choice(("full", "none", "mixed", "mixed"))
        for at in range(first, min(first + TABLE, -(-size // CLUSTER))):
            if kind == "full" or (kind == "mixed" and chance.random() < 0.02):
                clusters[at] = 1 if chance.random() < 0.1 else b"x"
    async with shown(seeks, build_image(size, clusters)) as disk:
        starts = [chance.randrange(size) for _ in range(60)]
        for start in (0, *starts, *(at * CLUSTER for at in clusters), size - 1):
            if start < size:
                assert seeks.data(start) == await disk.next_data(start)
                assert seeks.seek(os.SEEK_HOLE, start) == await disk.next_hole(start)


async def test_a_search_sees_each_change_of_the_disk(seeks: Seeks) -> None:
    """A write, a discard and a larger disk show in the next answer, without new tables."""
    async with shown(seeks, build_image(2 * SPAN, {3: b"x"})) as disk:
        assert seeks.seek(os.SEEK_HOLE, 3 * CLUSTER) == 4 * CLUSTER
        await disk.write(4 * CLUSTER, b"more")
        assert seeks.seek(os.SEEK_HOLE, 3 * CLUSTER) == 5 * CLUSTER
        await disk.write(SPAN, b"in a new table")
        assert seeks.data(5 * CLUSTER) == SPAN
        await disk.discard(3 * CLUSTER, CLUSTER)
        assert seeks.data(0) == 4 * CLUSTER
        assert seeks.data(SPAN + CLUSTER) is None
        await disk.grow(3 * SPAN)
        await disk.write(3 * SPAN - CLUSTER, b"in the new part")
        assert seeks.data(SPAN + CLUSTER) == 3 * SPAN - CLUSTER


async def test_missing_tables_are_skipped_by_the_l1_table_alone(seeks: Seeks) -> None:
    """A long hole takes two slices; a search that needs more than 64 is left to Python."""
    size = TABLE * SPAN
    image = build_image(size, {500 * TABLE + 3: b"x", **{at * TABLE: 1 for at in range(100)}})
    async with shown(seeks, image) as disk:
        tables = disk.tables_for_reads()
        looks = 0

        def get_slice(key: tuple[int, int]) -> object:
            nonlocal looks
            looks += 1
            return tables.get_slice(key)

        seeks.show(tables._replace(get_slice=get_slice))  # type: ignore[arg-type]
        assert seeks.data(200 * SPAN + 5) == 500 * SPAN + 3 * CLUSTER
        assert looks == 2
        assert seeks.data(501 * SPAN) is None
        assert seeks.seek(os.SEEK_HOLE, 200 * SPAN + 5) == 200 * SPAN + 5
        assert seeks.seek(os.SEEK_DATA, 38 * SPAN) == 500 * SPAN + 3 * CLUSTER
        assert seeks.seek(os.SEEK_DATA, 37 * SPAN) is None, "needs 65 slices"


async def test_a_search_goes_on_in_the_next_slice_of_the_l1_table(seeks: Seeks) -> None:
    """Data is found behind the border between two slices of the L1 table."""
    entries = 4 << 13
    span, slice_entries = entries << 16, 1 << 13
    data = (slice_entries + 5) * span + (9 << 16)
    clusters = {data >> 16: b"x"}
    image = build_image(3 * slice_entries * span, clusters, cluster_size=1 << 16, table_size=4)
    file = MemoryFile(image)
    async with opened(file, options=OpenOptions()) as disk:
        seeks.show(disk.tables_for_reads())
        assert seeks.seek(os.SEEK_DATA, 0) is None, "the table is in memory already"
        assert await disk.next_data(0) == data
        assert seeks.data(7 * span) == data
        assert seeks.data(data + 1) == data + 1
        assert seeks.seek(os.SEEK_HOLE, data) == data + (1 << 16)
        assert await disk.next_data(data + (1 << 16)) is None
        assert seeks.data(data + (1 << 16)) is None


async def test_a_search_in_a_partition_ends_with_it(seeks: Seeks) -> None:
    """Offsets count from the beginning of the partition; data and holes behind it do not count."""
    async with shown(seeks, build_image(SPAN, {3: b"x", 4: b"x", 5: b"x", 12: b"x"})) as disk:
        window = DiskWindow(disk, 4 * CLUSTER, 2 * CLUSTER, "part")
        seeks.show(window.tables_for_reads())
        assert seeks.data(1) == 1
        assert seeks.seek(os.SEEK_HOLE, 1) == 2 * CLUSTER, "the end counts as a hole"
        assert seeks.seek(os.SEEK_DATA, 2 * CLUSTER) is None, "Python refuses what is outside"
        window = DiskWindow(disk, 6 * CLUSTER, 4 * CLUSTER, "part")
        seeks.show(window.tables_for_reads())
        assert seeks.data(0) is None
        assert seeks.seek(os.SEEK_HOLE, 5) == 5


async def test_only_a_permitted_search_is_answered(seeks: Seeks) -> None:
    """Python is asked with the inode, and gets the request if it says no."""
    async with shown(seeks, build_image(SPAN, {3: b"x"})):
        assert seeks.seek(os.SEEK_DATA, 0) == 3 * CLUSTER
        assert seeks.asked == [NODE]
        seeks.is_permitted = False
        assert seeks.seek(os.SEEK_DATA, 0) is None


@pytest.mark.parametrize(
    ("whence", "start"),
    [(os.SEEK_DATA, SPAN), (os.SEEK_HOLE, SPAN), (os.SEEK_HOLE, -1), (9, 0)],
    ids=["data past the end", "a hole past the end", "a negative offset", "another whence"],
)
async def test_a_search_that_fails_is_left_to_python(whence: int, start: int, seeks: Seeks) -> None:
    """Python knows the error of each wrong argument."""
    async with shown(seeks, build_image(SPAN, {3: b"x"})):
        assert seeks.seek(os.SEEK_HOLE, 0) == 0
        assert seeks.seek(whence, start) is None


async def test_a_slice_with_a_bad_entry_is_left_to_python(seeks: Seeks) -> None:
    """Python counts a bad entry as data, so that a copy meets the error."""
    image = build_image(2 * SPAN, dict.fromkeys((0, 1, TABLE), b"x"))
    put_entry(image, l2_entry_offset(image, 1), get_entry(image, l2_entry_offset(image, 0)) + 7)
    async with shown(seeks, image, OpenOptions()):
        assert seeks.seek(os.SEEK_HOLE, 0) is None
        assert seeks.data(SPAN) == SPAN


@pytest.mark.parametrize("bases", [(), (bytes(SPAN),)], ids=["not open", "open"])
async def test_a_disk_with_a_base_is_left_to_python(bases: tuple[bytes, ...], seeks: Seeks) -> None:
    """Where the image has no cluster its base may have data, whether the base is open or not."""
    image = build_image(SPAN, {3: b"x"}, backing=b"base.raw")
    async with opened(MemoryFile(image), bases, OpenOptions()) as disk:
        await disk.next_data(0)
        seeks.show(disk.tables_for_reads())
        assert seeks.seek(os.SEEK_HOLE, 3 * CLUSTER) is None
