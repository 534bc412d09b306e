"""The first-write guard: what must be durable before an image may be modified."""

from __future__ import annotations

from typing import Final

import pytest
import trio

from qedfuse.disk.lookup.tablecache import TableCache, make_store
from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.freemap import FreeMap
from qedfuse.disk.space.quarantine import Quarantine
from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
from qedfuse.disk.writeback.headerstore import HeaderStore
from qedfuse.disk.writeback.metadata import MetadataWriteback
from qedfuse.errors import HostError, ReadOnlyError
from qedfuse.hostio.imagefile import read_header
from tests.support.disks import build_image, header_of
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile

CLUSTER: Final = 4096


async def make_guard(file: MemoryFile | FailingFile, hooks: list[object]) -> FirstWriteGuard:
    """Guard an image that has no tables in memory."""
    header = await read_header(file)
    tables = TableCache(file, header.geometry, make_store(1 << 20), lambda *_: None)
    writeback = MetadataWriteback(file, tables, Quarantine(Epochs(), FreeMap()))
    return FirstWriteGuard(file, HeaderStore(file, header), writeback, hooks)  # type: ignore[arg-type]


async def test_hooks_run_once_when_the_header_is_durable() -> None:
    """The header withdraws its claims, that is made durable, and then the hooks run in order."""
    file = RecordingFile(build_image(8 * CLUSTER, {}, autoclear=5))
    seen: list[object] = []

    async def first() -> None:
        seen.append(("first", header_of(file.content).autoclear_features, len(file.changes)))

    async def second() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("second")

    guard = await make_guard(file, [first, second])
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(guard.prepare_write)
    assert seen == [("first", 0, 2), "second"], "one write and one datasync came before"
    await guard.prepare_write()
    assert len(seen) == 2


async def test_a_hook_that_fails_lets_no_modification_pass() -> None:
    """The next caller of `prepare_write` runs the hooks again."""
    file = MemoryFile(build_image(8 * CLUSTER, {}, autoclear=5))
    failing = True

    async def hook() -> None:
        await trio.lowlevel.checkpoint()
        if failing:
            msg = "no"
            raise HostError(msg)

    guard = await make_guard(file, [hook])
    with pytest.raises(HostError):
        await guard.prepare_write()
    assert not guard.prepared
    failing = False
    await guard.prepare_write()


async def test_an_image_without_claims_needs_no_preparation() -> None:
    """Nothing is written and no hook runs."""
    file = RecordingFile(build_image(8 * CLUSTER, {}))

    async def hook() -> None:
        raise AssertionError

    guard = await make_guard(file, [hook])
    assert guard.prepared
    await guard.prepare_write()
    assert file.changes == []


async def test_a_read_only_image_lets_no_modification_pass() -> None:
    """The error names the file and the reason."""
    file = MemoryFile(build_image(8 * CLUSTER, {}), writable=False)
    guard = await make_guard(file, [])
    with pytest.raises(ReadOnlyError, match="read-only: opened read-only"):
        await guard.prepare_write()
