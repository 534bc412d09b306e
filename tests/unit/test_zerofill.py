"""Zero fill: which new clusters are filled with zeros, and that no write fails for lack of them."""

from __future__ import annotations

import errno
import os
from itertools import count
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import pytest

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import NoSpaceError
from tests.support import qemu
from tests.support.disks import build_image, guest_bytes, inspect_image, opened, pattern
from tests.support.hostfiles import BLOCK_BYTES, RecordingFile, Write

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.hostfile import Buffer

WritePathName: TypeAlias = Literal["fast", "slow"]

CLUSTER: Final = 4096
SIZE: Final = 1024 * CLUSTER

BIG_CLUSTER: Final = 1 << 16
"""Clusters for tests in which the host's blocks matter; `CLUSTER` is a single block."""
BIG_SIZE: Final = 64 * BIG_CLUSTER

both_paths = pytest.mark.parametrize("path", ["fast", "slow"])


async def write_on(path: WritePathName, disk: Disk, start: int, data: bytes) -> None:
    """Write on the fast or on the slow path."""
    if path == "fast":
        assert disk.try_write(start, data)
    else:
        assert await disk.write(start, data) == len(data)


async def make_ready(disk: Disk, number: int, cluster: int) -> None:
    """Write to a cluster whose table exists, so that the fast path can allocate; then flush."""
    await disk.ensure_scanned()
    await disk.write(number * cluster, b"first")
    await disk.read(0, disk.size)
    await disk.flush()
    # The first change after a flush may set NEED_CHECK, which needs a cycle of its own.
    await disk.write((number + 1) * cluster, b"second")


@both_paths
async def test_the_first_new_cluster_after_a_flush_is_filled(path: WritePathName) -> None:
    """The first new run after a flush is filled, wherever the data lies in it; no other is."""
    file = RecordingFile(build_image(SIZE, {500: b"there"}))
    file.in_page_cache = True

    async def write(start: int, data: bytes) -> tuple[int, ...]:
        """Write, and return the lengths of the writes to the file."""
        before = len(file.changes)
        await write_on(path, disk, start, data)
        changes = file.changes[before:]
        return tuple(len(change.data) for change in changes if isinstance(change, Write))

    async with opened(file) as disk:
        await make_ready(disk, 501, CLUSTER)
        assert await write(7 * CLUSTER, b"a" * 512) == (512,), "no flush"
        await disk.flush()
        await disk.write(8 * CLUSTER, b"next")
        assert await write(9 * CLUSTER, b"a" * 512) == (512,), "no flush since the last one"
        await disk.flush()
        assert await write(10 * CLUSTER, b"b" * 512) == (512, CLUSTER - 512)
        assert await write(10 * CLUSTER + 512, b"c" * 512) == (512,), "allocated already"
        assert await write(11 * CLUSTER + 700, b"c" * 512) == (512,), "the second after the flush"
        await disk.flush()
        assert await write(12 * CLUSTER + 700, b"d" * 500) == (500, 700, CLUSTER - 1200)
        await disk.flush()
        assert await write(14 * CLUSTER - 100, b"e" * 100) == (100, CLUSTER - 100)
        await disk.flush()
        assert await write(15 * CLUSTER, b"f" * CLUSTER) == (CLUSTER,), "no rest"
        assert await write(16 * CLUSTER + 1, b"f") == (1, 1, CLUSTER - 2)
        await disk.flush()
        assert await write(20 * CLUSTER, b"g" * (17 * CLUSTER - 1)) == (17 * CLUSTER - 1,), "long"
        await disk.flush()
        before = len(file.changes)
        await disk.allocate(40 * CLUSTER, CLUSTER)
        assert not any(
            isinstance(change, Write) and change.data for change in file.changes[before:]
        )
        await disk.flush()
        assert await write(50 * CLUSTER, b"h" * (2 * CLUSTER - 1)) == (2 * CLUSTER - 1, 1)
    expected = bytearray(60 * CLUSTER)
    for start, data in (
        (7 * CLUSTER, b"a" * 512),
        (8 * CLUSTER, b"next"),
        (9 * CLUSTER, b"a" * 512),
        (10 * CLUSTER, b"b" * 512 + b"c" * 512),
        (11 * CLUSTER + 700, b"c" * 512),
        (12 * CLUSTER + 700, b"d" * 500),
        (14 * CLUSTER - 100, b"e" * 100),
        (15 * CLUSTER, b"f" * (CLUSTER)),
        (16 * CLUSTER + 1, b"f"),
        (20 * CLUSTER, b"g" * (17 * CLUSTER - 1)),
        (50 * CLUSTER, b"h" * (2 * CLUSTER - 1)),
    ):
        expected[start : start + len(data)] = data
    assert guest_bytes(file.content)[: 60 * CLUSTER] == expected
    assert inspect_image(file.content).errors == ()


@both_paths
async def test_around_the_data_of_a_base_nothing_is_filled(path: WritePathName) -> None:
    """In an overlay the first new cluster after a flush keeps the bytes of the base."""
    base = pattern(SIZE, 3)
    file = RecordingFile(build_image(SIZE, {500: b"there"}, backing=b"base"))
    file.in_page_cache = True
    async with opened(file, [base]) as disk:
        await make_ready(disk, 501, CLUSTER)
        await disk.flush()
        await write_on(path, disk, 7 * CLUSTER + 700, b"new")
    expected = base[7 * CLUSTER : 7 * CLUSTER + 700] + b"new" + base[7 * CLUSTER + 703 :][:3393]
    assert guest_bytes(file.content, base)[7 * CLUSTER : 8 * CLUSTER] == expected


class _FullFile(RecordingFile):
    """A file whose host has space for few more blocks, once ``free_blocks`` is set.

    A block that holds only zeros counts as a hole.  A write that needs more blocks than are free
    writes what fits, as write(2) does.

    Attributes:
        free_blocks: How many more blocks the host has; None if there is no limit.
        refused: How many writes were refused, at least in part.
    """

    free_blocks: int | None = None
    refused = 0

    def _write_what_fits(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` up to the block for which there is no space; return if that was all."""
        stored = offset
        for block in count(offset - offset % BLOCK_BYTES, BLOCK_BYTES):
            if block >= offset + len(data):
                break
            if self.free_blocks is not None and not any(self.content[block : block + BLOCK_BYTES]):
                if not self.free_blocks:
                    self.refused += 1
                    super().try_write(offset, memoryview(data)[: stored - offset])
                    return False
                self.free_blocks -= 1
            stored = max(offset, block + BLOCK_BYTES)
        return super().try_write(offset, data)

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write what fits; return whether that was all."""
        return self._write_what_fits(offset, data)

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write what fits, and raise NoSpaceError if that was not all."""
        if not self._write_what_fits(offset, b"".join(parts)):
            msg = "image: write: no space"
            raise NoSpaceError(msg)


@both_paths
async def test_a_host_with_space_only_for_the_data(path: WritePathName) -> None:
    """If the host has space for the guest's data alone, the write succeeds, and a rest is a hole.

    The data lies at the end of the cluster, so zeros that were written first would take its space.
    """
    file = _FullFile(build_image(BIG_SIZE, {5: b"there"}, cluster_size=BIG_CLUSTER))
    file.in_page_cache = True
    data = b"d" * BLOCK_BYTES
    async with opened(file) as disk:
        await make_ready(disk, 6, BIG_CLUSTER)
        await disk.flush()
        file.free_blocks = 1
        await write_on(path, disk, 9 * BIG_CLUSTER - BLOCK_BYTES, data)
        assert file.refused == 1, "the zeros"
        assert disk.writable
        file.free_blocks = None
        cluster = bytes(BIG_CLUSTER - BLOCK_BYTES) + data
        assert bytes(await disk.read(8 * BIG_CLUSTER, BIG_CLUSTER)) == cluster
    assert guest_bytes(file.content)[8 * BIG_CLUSTER : 9 * BIG_CLUSTER] == cluster
    assert inspect_image(file.content).errors == ()
    assert inspect_image(file.content).leaks == 0


async def test_a_full_host_still_refuses_the_data() -> None:
    """If the host has no space for the guest's data either, the write fails with ENOSPC."""
    file = _FullFile(build_image(BIG_SIZE, {5: b"there"}, cluster_size=BIG_CLUSTER))
    file.in_page_cache = True
    async with opened(file) as disk:
        await make_ready(disk, 6, BIG_CLUSTER)
        await disk.flush()
        file.free_blocks = 0
        assert not disk.try_write(8 * BIG_CLUSTER + 4096, b"data")
        with pytest.raises(NoSpaceError) as caught:
            await disk.write(8 * BIG_CLUSTER + 4096, b"data")
        assert caught.value.errno == errno.ENOSPC
        file.free_blocks = None
        assert bytes(await disk.read(8 * BIG_CLUSTER, BIG_CLUSTER)) == bytes(BIG_CLUSTER)
        await disk.write(8 * BIG_CLUSTER + 4096, b"data")
    assert inspect_image(file.content).errors == ()
    assert inspect_image(file.content).leaks == 0


@both_paths
async def test_the_blocks_of_a_real_image(path: WritePathName, tmp_path: Path) -> None:
    """In a real image a filled cluster has no hole, the next one has; QEMU finds both valid."""
    image = tmp_path / "image.qed"
    await create_image(str(image), BIG_SIZE)
    expected = bytearray(BIG_SIZE)
    where = {}
    async with open_disk(str(image), OpenOptions(writable=True)) as disk:
        await make_ready(disk, 50, BIG_CLUSTER)
        expected[50 * BIG_CLUSTER :][:5] = b"first"
        for number, name in ((50, b"first"), (51, b"second")):
            expected[number * BIG_CLUSTER : number * BIG_CLUSTER + len(name)] = name
        await disk.flush()
        for number in (7, 20):
            start = number * BIG_CLUSTER + 5 * BLOCK_BYTES
            expected[start : start + BLOCK_BYTES] = b"d" * BLOCK_BYTES
            await write_on(path, disk, start, b"d" * BLOCK_BYTES)
            (extent,) = await disk.extents(number * BIG_CLUSTER, BIG_CLUSTER)
            where[number] = extent.file_offset
        await disk.flush()
        holes = {number: _first_hole(image, offset) for number, offset in where.items()}
    assert holes == {7: BIG_CLUSTER, 20: 0}
    raw = tmp_path / "expected.raw"
    raw.write_bytes(expected)
    found = qemu.check(image)
    assert (found.code, found.errors) == (0, 0), found.text
    assert qemu.compare(image, raw)


def _first_hole(image: Path, offset: int) -> int:
    """Return how many bytes of a cluster at a file offset lie before its first hole."""
    with image.open("rb") as file:
        return min(BIG_CLUSTER, os.lseek(file.fileno(), offset, os.SEEK_HOLE) - offset)
