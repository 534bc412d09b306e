"""Every task takes locks in the order that docs/concurrency.md lists."""

from __future__ import annotations

import random
import re
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import trio

import qedfuse
from tests.support.disks import (
    WRITABLE,
    build_image,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.freelists import put_list
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk

ROOT: Final = Path(qedfuse.__file__).parents[1]
CLUSTER: Final = 4096
SPAN: Final = 512
CLUSTERS: Final = 6 * SPAN


def documented() -> list[str]:
    """Return the order from the page."""
    text = (ROOT / "docs" / "concurrency.md").read_text()
    section = text.split("## Locks, in the order", 1)[1].split("\n\n", 2)[1]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


class Watch:
    """Records which locks each task holds when it asks for another one."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.edges: set[tuple[str, str]] = set()
        self._held: dict[trio.lowlevel.Task, list[str]] = {}

    @asynccontextmanager
    async def holding(self, name: str, lock: trio.Lock | None = None) -> AsyncIterator[None]:
        """Take a lock, or note one that the caller has asked for."""
        held = self._held.setdefault(trio.lowlevel.current_task(), [])
        self.edges.update((before, name) for before in held)
        if lock is not None:
            await lock.acquire()
        held.append(name)
        try:
            yield
        finally:
            held.remove(name)
            if lock is not None:
                lock.release()

    def watch(self, disk: Disk) -> None:
        """Watch all locks of a disk."""
        parts = disk._components
        for name, owner, attribute in (
            ("DiskSize.lock", parts.disk_size, "lock"),
            ("Scan._lock", parts.scan, "_lock"),
            ("TableWriter._lock", parts.table_writer, "_lock"),
            ("Reclaim._lock", parts.reclaim, "_lock"),
            ("FirstWriteGuard._lock", parts.first_write_guard, "_lock"),
            ("FileLength.lock", parts.length, "lock"),
            ("HeaderStore._lock", parts.header_store, "_lock"),
        ):
            setattr(owner, attribute, WatchedLock(self, name, getattr(owner, attribute)))
        hold = parts.write_path.allocation_lock.hold

        @asynccontextmanager
        async def watched(start: int, end: int) -> AsyncIterator[None]:
            async with self.holding("WritePath.allocation_lock"), hold(start, end):
                yield

        parts.write_path.allocation_lock.hold = watched  # type: ignore[method-assign]


class WatchedLock:
    """A lock that reports which task takes it."""

    def __init__(self, watch: Watch, name: str, lock: trio.Lock) -> None:
        self._watch, self._name, self._lock = watch, name, lock
        self.locked = lock.locked
        self._open: list[object] = []

    async def __aenter__(self) -> None:
        manager = self._watch.holding(self._name, self._lock)
        await manager.__aenter__()
        self._open.append(manager)

    async def __aexit__(self, *error: object) -> None:
        await self._open.pop().__aexit__(*error)  # type: ignore[attr-defined]


async def requests(disk: Disk, chance: random.Random) -> None:
    """Make the requests of a guest and its owner, at random."""
    for _ in range(40):
        number = chance.randrange(CLUSTERS)
        match chance.randrange(12):
            case 0 | 1 | 2:
                length = chance.choice((512, CLUSTER, 9 * CLUSTER))
                await disk.write(number * CLUSTER + chance.choice((0, 512)), pattern(length, 1))
            case 3 | 4 | 5:
                await disk.discard(number * CLUSTER, chance.randrange(40) * CLUSTER)
            case 6:
                await disk.flush()
            case 7:
                await disk.allocate(number * CLUSTER, 5 * CLUSTER)
            case 8:
                await disk.grow(disk.size + CLUSTER)
            case 9:
                await disk.discard(disk.size - CLUSTER - 512, CLUSTER + 512)
            case 10:
                await disk._components.needcheck.clear()
            case _:
                await disk.read(number * CLUSTER, CLUSTER)


async def play(
    seed: int, tasks: int, compact: Literal["off", "full"], *, listed: bool
) -> set[tuple[str, str]]:
    """Use a disk with leaks and autoclear bits, and return the edges between locks."""
    chance = random.Random(seed)
    used = {n: pattern(CLUSTER, n) for n in chance.sample(range(3 * SPAN), 40)}
    content = build_image(CLUSTERS * CLUSTER - 512, used, autoclear=6)
    content.extend(pattern(9 * CLUSTER, 2) + pattern(CLUSTER, 3))
    put_entry(content, l2_entry_offset(content, min(used)), len(content) - CLUSTER)
    if listed:
        put_list(content)
    watch = Watch()
    file = MemoryFile(content)
    async with opened(file, options=replace(WRITABLE, compact=compact)) as disk:
        watch.watch(disk)
        if not listed:
            await disk.ensure_scanned()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(requests, disk, chance)
    assert inspect_image(file.content).errors == ()
    free = disk._components.allocator.free
    for rest in (disk._components.allocator.unpunched, disk._components.allocator.maybe_holes):
        assert all(free.count_free(first, count) == count for first, count in rest.runs())
    return watch.edges


async def test_the_order_is_that_of_the_page() -> None:
    """No task asks for a lock while it holds the same or a later one of the page."""
    order = documented()
    edges: set[tuple[str, str]] = set()
    for seed, tasks in enumerate((0, 0, 1, 6)):
        edges |= await play(seed, tasks, "off", listed=seed > 0)
        edges |= await play(seed, tasks, "full", listed=seed == 0)
    assert {name for edge in edges for name in edge} == set(order)
    wrong = [edge for edge in edges if order.index(edge[0]) >= order.index(edge[1])]
    assert not wrong
    # The less obvious ones are there.
    assert ("WritePath.allocation_lock", "Scan._lock") in edges
    assert ("Reclaim._lock", "FirstWriteGuard._lock") in edges
    assert ("DiskSize.lock", "HeaderStore._lock") in edges


async def test_a_wrong_order_is_found() -> None:
    """The watch detects a wrong order."""
    watch, one, two = Watch(), trio.Lock(), trio.Lock()
    first, second = WatchedLock(watch, "one", one), WatchedLock(watch, "two", two)
    async with second, first:
        assert one.locked()
    async with first:
        pass
    assert watch.edges == {("two", "one")}
    assert not one.locked()
