"""Long requests that never have to wait still let other tasks run every few milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from qedfuse.disk.maintenance.disksize import first_in_use
from qedfuse.disk.state.freelistwriter import write_list
from qedfuse.ondisk.constants import ZERO
from qedfuse.util.pace import MAX_STEPS
from tests.support.disks import WRITABLE, build_image, header_of, opened
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


async def test_filling_reused_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run while reserved clusters that were in use before are filled with zeros."""
    monkeypatch.setattr("qedfuse.disk.datapath.writepath._MAX_COPY_BYTES", CLUSTER)
    used = 512
    numbers = [*range(used), 2 * used - 1]
    file = EagerFile(build_image(SIZE, dict.fromkeys(numbers, b"x")))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(0, used * CLUSTER)
        await disk.flush()
        assert disk.statistics().free_clusters == used
        writes = file.counts["write"]
        most, _ = await longest(file, disk.allocate(used * CLUSTER, (used - 1) * CLUSTER))
        assert disk.statistics().free_clusters == 1
        assert file.counts["write"] - writes >= used - 1
    assert most <= 3 * MAX_STEPS  # as above


async def test_filling_a_table_in_reused_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run while a new table is filled with zeros in clusters that were in use."""
    step = 256
    monkeypatch.setattr("qedfuse.disk.datapath.tablewriter._MAX_ZERO_WRITE_BYTES", step)
    span, table = 16 * 512, 16
    image = build_image(2 * span * CLUSTER, dict.fromkeys(range(64), b"x"), table_size=table)
    file = EagerFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(0, 60 * CLUSTER)
        await disk.flush()
        end = disk.statistics().file_bytes
        writes = file.counts["write"]
        most, _ = await longest(file, disk.write(span * CLUSTER, b"x"))
        assert disk.statistics().file_bytes == end, "the table lies in free clusters"
        assert file.counts["write"] - writes >= table * CLUSTER // step
    assert most <= 3 * MAX_STEPS  # as above


async def test_writing_a_free_list() -> None:
    """Other tasks run while a list with many runs is written."""
    image = build_image(SIZE)
    file = EagerFile(image)
    runs = np.array([(first, 1) for first in range(10, 60_000, 2)], np.uint64)
    most, calls = await longest(file, write_list(file, header_of(image), runs))
    assert calls > 3 * MAX_STEPS
    assert most <= 3 * MAX_STEPS  # as above
