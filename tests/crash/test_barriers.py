"""The explorer finds a violation if any one of the barriers is left out."""

from __future__ import annotations

import re
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.disk.autocompaction import AutoCompaction
from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.marking import Marking
from qedfuse.disk.space.quarantine import Quarantine
from qedfuse.disk.space.reclaim import Reclaim
from qedfuse.disk.space.spacemanager import SpaceManager
from qedfuse.disk.state.needcheck import NeedCheck
from qedfuse.disk.writeback.metadata import MetadataWriteback
from tests.crash.cases import CASES, CLUSTER
from tests.crash.workloads import run_case
from tests.support.explorer import Exploration, Explorer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from qedfuse.disk.lookup.tablecache import WriteBack
    from qedfuse.disk.space.allocator import Allocator, Run

STATES: Final = 3000
SEEDS: Final = 12

Sabotage = "Callable[[pytest.MonkeyPatch], None]"


def without_datasync(nth: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave out a datasync of the commit round: 1 before L2, 2 before L1, 3 at the end."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        in_round, sync = MetadataWriteback._cycle, MetadataWriteback._sync_or_give_back
        count = 0

        async def counted_round(self: MetadataWriteback) -> None:
            nonlocal count
            count = 0
            await in_round(self)

        async def leaky_sync(self: MetadataWriteback, writes: Sequence[WriteBack]) -> None:
            nonlocal count
            count += 1
            # The second is the last if there is no L1 entry to write.
            which = 3 if count == 2 and not writes else count
            if which != nth:
                await sync(self, writes)

        patch.setattr(MetadataWriteback, "_cycle", counted_round)
        patch.setattr(MetadataWriteback, "_sync_or_give_back", leaky_sync)

    return sabotage


def without_barrier(caller: str, nth: int = 1, of: int = 1) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave out a barrier that a function waits for: the ``nth`` of the ``of`` that it has."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        barrier = MetadataWriteback.barrier
        seen = 0

        async def leaky(self: MetadataWriteback) -> None:
            nonlocal seen
            if sys._getframe(1).f_code.co_qualname == caller:
                seen = seen % of + 1
                if seen == nth:
                    self.note_write()
                    return
            await barrier(self)

        patch.setattr(MetadataWriteback, "barrier", leaky)

    return sabotage


def bit_not_set(patch: pytest.MonkeyPatch) -> None:
    """Change tables without setting NEED_CHECK first."""

    @asynccontextmanager
    async def changing(_: NeedCheck) -> AsyncIterator[None]:
        yield

    patch.setattr(NeedCheck, "changing", changing)


def bit_cleared_early(patch: pytest.MonkeyPatch) -> None:
    """Clear NEED_CHECK without making everything durable first."""

    async def clear(self: NeedCheck) -> bool:
        l2, l1 = self._writeback._tables.take_dirty()
        await self._writeback._write(l2 + l1)
        await self._header_store.change(lambda header: header.with_need_check(value=False))
        self._writeback.note_write()
        return True

    patch.setattr(NeedCheck, "clear", clear)


def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    """Hand clusters out again immediately."""

    def retire(self: Reclaim, offset: int, length: int, _dropped_by: int) -> None:
        self._allocator.give_back(offset >> self._bits, length >> self._bits)

    patch.setattr(Reclaim, "retire", retire)


def short_quarantine(patch: pytest.MonkeyPatch) -> None:
    """Hand clusters out again when the cycle begins that drops them."""
    init, began = Reclaim.__init__, Quarantine.cycle_began
    allocators: dict[Quarantine, Allocator] = {}

    def remember(self: Reclaim, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        allocators[self._quarantine] = self._allocator

    def cycle_began(self: Quarantine) -> None:
        began(self)
        self.cycle_durable()
        while (reusable := self.pop_reusable()) is not None:
            allocators[self].give_back_block(*reusable)

    patch.setattr(Reclaim, "__init__", remember)
    patch.setattr(Quarantine, "cycle_began", cycle_began)


def sealed_late(patch: pytest.MonkeyPatch) -> None:
    """Let a cycle cover clusters that lost their reference while it was running."""
    durable = Quarantine.cycle_durable

    def late(self: Quarantine) -> None:
        self.cycle_began()
        durable(self)

    patch.setattr(Quarantine, "cycle_durable", late)


def taken_for_never_written(patch: pytest.MonkeyPatch) -> None:
    """Take clusters that are used again for new ones, which hold zeros."""
    grow_over = SpaceManager._grow_over

    async def never_written(self: SpaceManager, first: int, count: int) -> Run:
        return (await grow_over(self, first, count))._replace(never_written=True)

    patch.setattr(SpaceManager, "_grow_over", never_written)


def unwatched_scan(patch: pytest.MonkeyPatch) -> None:
    """Let the scan take clusters for free that lost their reference while it was running.

    Each of the two methods prevents that alone.
    """
    patch.setattr(Marking, "record_drop", lambda *_: None)
    patch.setattr(Marking, "record_change", lambda *_: None)


def no_grace(patch: pytest.MonkeyPatch) -> None:
    """Do not wait for requests that may still use a cluster."""
    patch.setattr(Epochs, "is_drained", lambda *_: True)


def early_punch(patch: pytest.MonkeyPatch) -> None:
    """Punch clusters while the table on the disk still refers to them."""
    in_round = MetadataWriteback._cycle

    async def punching(self: MetadataWriteback) -> None:
        quarantine = self._observer
        assert isinstance(quarantine, Quarantine)
        for first, count in quarantine._unsealed.runs():
            await self._file.punch((first * CLUSTER, count * CLUSTER))
        await in_round(self)

    patch.setattr(MetadataWriteback, "_cycle", punching)


AUTO: Final = "automatic compaction within limits"


def early_punch_of_discards(patch: pytest.MonkeyPatch) -> None:
    """Do so in a disk that is not compacted at its end: what moves, a discard has not zeroed."""

    async def no_compaction(_: AutoCompaction) -> None:
        pass

    early_punch(patch)
    patch.setattr(AutoCompaction, "run", no_compaction)


BARRIERS: Final[dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]]] = {
    "datasync before L2": (without_datasync(1), "discards", "holds"),
    "datasync before L1": (without_datasync(2), "new tables", ""),
    "datasync at the end": (without_datasync(3), "reuse", ""),
    "NEED_CHECK set first": (bit_not_set, "idle", "NEED_CHECK"),
    "NEED_CHECK cleared last": (bit_cleared_early, "idle", ""),
    "quarantine": (no_quarantine, "reuse", "holds"),
    "quarantine until durable": (short_quarantine, "slow host", "holds|wild"),
    "quarantine seals first": (sealed_late, "slow host", "holds|wild"),
    "new clusters or used ones": (taken_for_never_written, "new tables", "holds|wild|owners"),
    "scan sees changes": (unwatched_scan, "late scan on a slow host", "holds|owners"),
    "compaction: copy before entry": (without_datasync(1), "compaction", "holds"),
    "compaction: quarantine": (no_quarantine, "compaction", "holds|owners"),
    "compaction: punch after durable": (early_punch, "compaction", "holds zeros"),
    "automatic compaction: copy before entry": (without_datasync(1), AUTO, "holds"),
    "automatic compaction: quarantine": (no_quarantine, AUTO, "holds|owners"),
    "automatic compaction: punch after durable": (early_punch, AUTO, "holds zeros"),
    "grace": (no_grace, "slow host", ""),
    "autoclear": (without_barrier("FirstWriteGuard.prepare_write"), "autoclear", "autoclear"),
    "resize, before": (without_barrier("Resize.resize"), "grow", "show"),
    "resize, after": (without_barrier("HeaderStore.change"), "grow", "was grown"),
    "free list, list before bit": (
        without_barrier("PersistentFreeList.save", 1, 2),
        "free list",
        "free",
    ),
    "free list, dropped first": (
        without_barrier("FirstWriteGuard.prepare_write"),
        "free list",
        "free",
    ),
}


REDUNDANT_BARRIERS: Final[dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]]] = {
    "discard: punch after durable": (early_punch_of_discards, "reuse"),
    "free list, bit at the end": (without_barrier("PersistentFreeList.save", 2, 2), "free list"),
}
"""What no state tells of: a discarded cluster may read as zeros before its discard is
durable, and a list that a crash loses is only missed."""


def explore(name: str, sabotage: Callable[[pytest.MonkeyPatch], None]) -> Exploration:
    """Carry out a sabotaged case, and explore it until something is found."""
    case = next(case for case in CASES if case.name == name)
    found = Exploration()
    for seed in range(SEEDS):
        with pytest.MonkeyPatch.context() as patch:
            sabotage(patch)
            workload = run_case(case, seed, may_fail=True)
        explorer = Explorer(name, seed, workload.history, workload.bases)
        found.misread += [*workload.history.misread, *map(str, workload.errors)]
        found.add(trio.run(explorer.explore, STATES))
        if found.violations:
            break
    return found


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("barrier", BARRIERS)
def test_barrier_is_needed(barrier: str) -> None:
    """Without it a state is found that breaks a promise, and of the right kind."""
    sabotage, case, text = BARRIERS[barrier]
    found = explore(case, sabotage)
    words = found.misread + [text for _, text in found.violations.values()]
    print(f"{barrier}: {found.violated} of {found.states}: {words[:6]}")  # noqa: T201  for the docs
    assert any(re.search(text, word) for word in words), f"{found}: {words}"


@pytest.mark.parametrize("barrier", REDUNDANT_BARRIERS)
def test_barrier_is_spare(barrier: str) -> None:
    """Without it nothing is found, so nobody should rely on it."""
    sabotage, case = REDUNDANT_BARRIERS[barrier]
    found = explore(case, sabotage)
    assert not found.violations, found.report()
    assert found.states > STATES
