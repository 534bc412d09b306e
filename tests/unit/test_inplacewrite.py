"""Writes to allocated clusters, which the extension carries out itself (``_inplacewrite.c``)."""

from __future__ import annotations

import random
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.window import DiskWindow
from qedfuse.errors import HostError
from qedfuse.hostio.inlinepolicy import ALWAYS_SHORT_WRITE_BYTES
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.handles import HANDLE_DIRECT, HANDLE_SYNC, HANDLE_WRITER
from tests.support.readsession import INODE, Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from qedfuse.disk.disk import Disk

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

CLUSTER = 4096
SIZE = 256 * CLUSTER


@pytest.fixture
def session() -> Iterator[Session]:
    """Return a session, which ends with the test."""
    made = Session()
    yield made
    extraops.end()
    made.wire.close()


@asynccontextmanager
async def shown(
    session: Session, directory: Path, options: OpenOptions | None = None
) -> AsyncIterator[Disk]:
    """Let the extension write to a disk whose first half is allocated, in its order."""
    path = str(directory / "disk.qed")
    await create_image(path, SIZE, cluster_size=CLUSTER, table_size=1)
    async with open_disk(path, OpenOptions(writable=True)) as disk:
        await disk.write(0, b"\xff" * (SIZE // 2))
    async with open_disk(path, options or OpenOptions(writable=True)) as disk:
        await disk.read(0, SIZE)  # reads the table into memory
        assert disk.try_locate(0, 1) is not None
        session.show(*disk.tables_for_reads())
        yield disk


async def test_a_write_to_allocated_clusters_is_made_by_the_extension(
    session: Session, tmp_path: Path
) -> None:
    """The bytes are in the file, and the next flush makes them durable."""
    async with shown(session, tmp_path) as disk:
        cycles = disk.statistics().writeback.cycles
        await disk.flush()
        assert disk.statistics().writeback.cycles == cycles, "there is something to flush already"
        data = random.Random("data").randbytes(3 * CLUSTER)
        for handle in (INODE, INODE | HANDLE_WRITER | HANDLE_DIRECT):
            assert session.write(CLUSTER // 2, data, handle)
        assert await disk.read(0, 4 * CLUSTER) == (
            b"\xff" * (CLUSTER // 2) + data + b"\xff" * (CLUSTER // 2)
        )
        await disk.flush()
        assert disk.statistics().writeback.cycles == cycles + 1


@pytest.mark.parametrize(
    ("start", "length", "handle"),
    [
        pytest.param(SIZE // 2, 512, INODE, id="unallocated"),
        pytest.param(SIZE // 2 - 512, 1024, INODE, id="allocated in part"),
        pytest.param(SIZE - 512, 1024, INODE, id="past the end"),
        pytest.param(1 << 40, 512, INODE, id="far past the end"),
        pytest.param(0, 512, INODE | HANDLE_SYNC, id="must be durable"),
        pytest.param(0, 512, INODE + 1, id="other disk"),
    ],
)
async def test_other_writes_are_passed_on(
    start: int, length: int, handle: int, session: Session, tmp_path: Path
) -> None:
    """The function for writes gets the whole write, and nothing was written."""
    async with shown(session, tmp_path) as disk:
        before = await disk.read(0, SIZE)
        assert not session.write(start, bytes(length), handle)
        assert await disk.read(0, SIZE) == before
        assert session.write(0, bytes(ALWAYS_SHORT_WRITE_BYTES)), "no write is made"


async def test_zero_clusters_and_scattered_clusters_are_passed_on(
    session: Session, tmp_path: Path
) -> None:
    """A write that needs a new cluster, or two system calls, is left to Python."""
    async with shown(session, tmp_path) as disk:
        await disk.discard(2 * CLUSTER, CLUSTER)
        await disk.write(SIZE // 2, b"\xff" * CLUSTER)
        await disk.write(2 * CLUSTER, b"\xff" * CLUSTER)
        assert session.write(2 * CLUSTER, b"one")
        assert not session.write(2 * CLUSTER - 1, b"two")
        await disk.discard(4 * CLUSTER, CLUSTER)
        assert not session.write(4 * CLUSTER, b"zero")


async def test_a_long_write_is_made_while_such_writes_are_fast(
    session: Session, tmp_path: Path
) -> None:
    """A write that would take long, as the last one did, is left to a thread."""
    length = ALWAYS_SHORT_WRITE_BYTES + 1
    data = random.Random("long").randbytes(length)
    async with shown(session, tmp_path) as disk:
        target = disk._file.write_target
        assert target is not None
        assert session.write(CLUSTER, data)
        assert await disk.read(CLUSTER, length) == data
        target.record_write(length, 60.0)
        assert not session.write(CLUSTER, bytes(length))
        assert await disk.read(CLUSTER, length) == data
        assert session.write(CLUSTER, bytes(length - 1)), "a write that is always short is asked"


@pytest.mark.parametrize("why", ["guard", "failure", "contention"])
async def test_a_write_that_must_wait_is_passed_on(
    why: str, session: Session, tmp_path: Path
) -> None:
    """So is one that the disk refuses, and one before which the header must change."""
    async with shown(session, tmp_path) as disk:
        assert session.write(0, b"data")
        if why == "guard":
            disk._first_write_guard.prepared = False
        elif why == "failure":
            disk._writeback.failure = HostError("test")
        else:
            target = disk._file.write_target
            assert target is not None
            target.inode.contention += 1
        assert not session.write(0, b"else")
        assert await disk.read(0, 4) == b"data"
        disk._writeback.failure = None


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(OpenOptions(), id="read-only"),
        pytest.param(OpenOptions(writable=True, detect_zeroes="on"), id="zeros are detected"),
    ],
)
async def test_disks_whose_writes_are_not_plain_are_left_to_python(
    options: OpenOptions, session: Session, tmp_path: Path
) -> None:
    """The extension writes only if the data is written as it comes."""
    async with shown(session, tmp_path, options) as disk:
        assert not session.write(0, b"data")
        assert await disk.read(0, 4) == b"\xff" * 4


async def test_a_write_to_a_window_is_confined_to_it(session: Session, tmp_path: Path) -> None:
    """Offsets count from the beginning of the partition, and its end is the end."""
    async with shown(session, tmp_path) as disk:
        window = DiskWindow(disk, 3 * CLUSTER, CLUSTER, "part")
        session.show(*window.tables_for_reads())
        assert session.write(1, b"inside")
        assert not session.write(CLUSTER - 1, b"over")
        assert await disk.read(3 * CLUSTER, 7) == b"\xffinside"
        assert await disk.read(4 * CLUSTER - 1, 2) == b"\xff" * 2


async def test_a_write_that_the_host_refuses_is_passed_on(session: Session, tmp_path: Path) -> None:
    """Python meets the error again, and reports it."""
    async with shown(session, tmp_path) as disk:
        tables = disk.tables_for_reads()
        assert tables.writes is not None
        recorded: list[object] = []
        with (tmp_path / "disk.qed").open("rb") as read_only:
            session.show(
                *tables._replace(
                    writes=tables.writes._replace(
                        fd=read_only.fileno(), record=lambda *said: recorded.append(said)
                    )
                )
            )
            assert not session.write(0, b"data")
        assert recorded == [], "a failed write counts as made"


async def test_the_time_of_a_write_is_recorded(session: Session, tmp_path: Path) -> None:
    """The policy of the file gets the length and the seconds, as for a write of Python."""
    async with shown(session, tmp_path) as disk:
        tables = disk.tables_for_reads()
        assert tables.writes is not None
        recorded: list[tuple[int, float]] = []
        record = tables.writes._replace(record=lambda *said: recorded.append(said))
        session.show(*tables._replace(writes=record))
        assert session.write(0, b"data")
        ((length, seconds),) = recorded
        assert length == 4
        assert 0.0 < seconds < 60.0


async def test_a_write_is_durable_after_a_flush_even_if_its_time_cannot_be_recorded(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk learns of the write first, so the next flush makes it durable (D1)."""
    async with shown(session, tmp_path) as disk:

        def fail(_length: int, _seconds: float) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(disk._file, "_record_write", fail)
        reported: list[object] = []
        monkeypatch.setattr(sys, "unraisablehook", reported.append)
        session.show(*disk.tables_for_reads())
        cycles = disk.statistics().writeback.cycles
        assert session.write(0, b"data")
        assert len(reported) == 1
        await disk.flush()
        assert disk.statistics().writeback.cycles == cycles + 1
        monkeypatch.undo()


@pytest.mark.parametrize("seed", range(3))
async def test_the_extension_and_the_disk_write_the_same(
    seed: int, session: Session, tmp_path: Path
) -> None:
    """After any changes of a disk, a write is right or passed on."""
    rng = random.Random(seed)
    made = passed = 0
    async with shown(session, tmp_path) as disk:
        model = bytearray(await disk.read(0, SIZE))
        for _ in range(400):
            start = rng.randrange(SIZE)
            data = rng.randbytes(rng.choice([1, 512, CLUSTER, 5 * CLUSTER]))[: SIZE - start]
            match rng.randrange(6):
                case 0:
                    await disk.discard(start, len(data))
                    data = bytes(len(data))
                case 1:
                    await disk.compact(within_bound=False)
                    data = b""
                case 2:
                    await disk.write(start, data)
                case _ if session.write(start, data):
                    made += 1
                case _:
                    passed += 1
                    await disk.write(start, data)
            model[start : start + len(data)] = data
        assert await disk.read(0, SIZE) == model
    assert made > 50
    assert passed > 20
    async with open_disk(str(tmp_path / "disk.qed"), OpenOptions()) as disk:
        assert await disk.read(0, SIZE) == model
