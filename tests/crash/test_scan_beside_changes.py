"""The scan for free space reads tables that have changed since it began."""

from __future__ import annotations

import pytest
import trio

from qedfuse.disk.space.scan import Scan
from tests.support.disks import build_image, inspect_image, opened
from tests.support.hostfiles import MemoryFile

CLUSTER = 4096


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Let scans wait for an event."""
    walk, event = Scan._walk, trio.Event()

    async def late(self: Scan) -> None:
        await event.wait()
        await walk(self)

    monkeypatch.setattr(Scan, "_walk", late)
    return event


async def test_scan_reads_entries_that_are_newer_than_itself(go: trio.Event) -> None:
    """Tables that were written back meanwhile point past the end that the file had."""
    file = MemoryFile(build_image(512 * CLUSTER, {0: b"a", 1: b"b", 2: b"c"}))
    async with opened(file) as disk:
        for number in range(100, 140):
            await disk.write(number * CLUSTER, b"x" * CLUSTER)
        await disk.discard(CLUSTER, CLUSTER)
        await disk.flush()
        go.set()
        await disk.wait_scanned()
        await disk.flush()
        assert disk.statistics().free_clusters == 1
    assert inspect_image(file.content).errors == ()


async def test_a_leak_at_the_end_that_the_file_has_grown_over(go: trio.Event) -> None:
    """Leaked clusters at the end are free, although the file has grown since."""
    file = MemoryFile(build_image(512 * CLUSTER, {0: b"a"}) + bytes(3 * CLUSTER))
    async with opened(file) as disk:
        await disk.write(5 * CLUSTER, b"x")
        go.set()
        await disk.wait_scanned()
        assert disk.statistics().free_clusters == 3
