"""Long requests that never have to wait still let other tasks run every few milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.disk.maintenance.disksize import first_in_use
from qedfuse.ondisk.constants import ZERO
from qedfuse.util.pace import MAX_STEPS
from tests.support.disks import WRITABLE, build_image, opened
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import Action

CLUSTER = 4096
CLUSTERS = 2048
SIZE = CLUSTERS * CLUSTER
SCATTERED = dict.fromkeys(range(0, CLUSTERS, 2), b"x")


class EagerFile(MemoryFile):
    """A host file that is completely in the page cache: no call lets other tasks run."""

    async def _enter(self, action: Action) -> None:
        self.counts[action] += 1

    async def reserve(self, offset: int, length: int) -> None:
        """Count; there is room."""
        del offset, length
        self.counts["reserve"] += 1


async def longest(file: MemoryFile, work: Awaitable[object]) -> tuple[int, int]:
    """Do some work; give the most host calls between two turns of another task, and all."""
    most, before, done = 0, file.counts.total(), False

    async def other() -> None:
        nonlocal most, before
        while not done:
            most = max(most, file.counts.total() - before)
            before = file.counts.total()
            await trio.lowlevel.checkpoint()

    first = file.counts.total()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await work
        most = max(most, file.counts.total() - before)
        done = True
    return most, file.counts.total() - first


WORK: dict[str, Callable[[Disk], Awaitable[object]]] = {
    "nodiscard": lambda disk: disk.discard(0, SIZE),
    "zeros that keep clusters": lambda disk: disk.write(0, bytes(SIZE)),
    "allocate": lambda disk: disk.allocate(0, SIZE),
}


@pytest.mark.parametrize("work", WORK)
async def test_host_calls_between_other_tasks(work: str) -> None:
    """Between two runs of another task there are few host calls, however long a request is."""
    file = EagerFile(build_image(SIZE, SCATTERED))
    zeroes = "on" if work.startswith("zeros") else "off"
    options = replace(WRITABLE, discard=False, detect_zeroes=zeroes)  # type: ignore[arg-type]
    async with opened(file, options=options) as disk:
        await disk.ensure_scanned()
        await disk.flush()
        most, calls = await longest(file, WORK[work](disk))
    assert calls >= len(SCATTERED)
    # Two turns of ours may come together, as trio draws who is first; beside the writes that
    # are counted as steps there are the tables'.
    assert most <= 3 * MAX_STEPS


async def test_looking_through_tables() -> None:
    """Other tasks run during a search through a table with many small extents."""
    marks = dict.fromkeys(range(0, 8192, 2), ZERO)
    file = EagerFile(build_image(8192 * CLUSTER, marks, table_size=16))
    turns, done = 0, False

    async def other() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with opened(file) as disk:
        await disk.ensure_scanned()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await first_in_use(disk._components.layer, 0, disk.size) is None
            done = True
    assert turns >= 7


async def test_hiding_a_longer_base() -> None:
    """Other tasks run while the tables that hide a base are made and written."""
    size, tables = 100 * 512 * CLUSTER, 100
    file = EagerFile(build_image(CLUSTER, backing=b"base"))
    async with opened(file, [build_image(size)]) as disk:
        await disk.ensure_scanned()
        most, calls = await longest(file, disk.grow(size))
    assert calls >= tables
    assert most <= 3 * MAX_STEPS  # as above
