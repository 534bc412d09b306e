"""The scan for free space is correct on tables that change after it has started."""

from __future__ import annotations

import pytest
import trio

from qedfuse.disk.space.scan import Scan
from tests.support.disks import build_image, inspect_image, opened
from tests.support.hostfiles import MemoryFile

CLUSTER = 4096


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Return an event that every scan waits for before it reads a table."""
    walk, event = Scan._walk, trio.Event()

    async def late(self: Scan) -> None:
        await event.wait()
        await walk(self)

    monkeypatch.setattr(Scan, "_walk", late)
    return event


async def test_scan_accepts_entries_past_the_old_end_of_the_file(go: trio.Event) -> None:
    """The scan accepts entries that point past the end that the file had when it started."""
    file = MemoryFile(build_image(512 * CLUSTER, {0: b"a", 1: b"b", 2: b"c"}))
    async with opened(file) as disk:
        for number in range(100, 140):
            await disk.write(number * CLUSTER, b"x" * CLUSTER)
        await disk.discard(CLUSTER, CLUSTER)
        await disk.flush()
        go.set()
        await disk.ensure_scanned()
        await disk.flush()
        assert disk.statistics().free_clusters == 1
    assert inspect_image(file.content).errors == ()


async def test_leak_at_the_old_end_of_the_file(go: trio.Event) -> None:
    """Leaked clusters at the end of the file are free, although the file has grown since."""
    file = MemoryFile(build_image(512 * CLUSTER, {0: b"a"}) + bytes(3 * CLUSTER))
    async with opened(file) as disk:
        await disk.write(5 * CLUSTER, b"x")
        go.set()
        await disk.ensure_scanned()
        assert disk.statistics().free_clusters == 3
