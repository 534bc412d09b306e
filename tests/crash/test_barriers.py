"""Each barrier is needed: without it the explorer finds a crash state that breaks a promise.

Each *sabotage* removes one barrier from the code under test: a datasync, a quarantine, an order
of steps.  `Saboteur` makes sure that it does: without that, a sabotage that removes nothing
would show that the barrier is not needed.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.disk.autocompaction import AutoCompaction
from qedfuse.disk.maintenance.diskgrowth import DiskGrowth
from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.marking import Marking
from qedfuse.disk.space.quarantine import Quarantine
from qedfuse.disk.space.reclaim import Reclaim
from qedfuse.disk.space.spacemanager import SpaceManager
from qedfuse.disk.state.needcheck import NeedCheck
from qedfuse.disk.state.persistentfreelist import PersistentFreeList
from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
from qedfuse.disk.writeback.headerstore import HeaderStore
from qedfuse.disk.writeback.metadata import MetadataWriteback
from tests.crash.cases import CASES, CLUSTER
from tests.crash.workloads import run_case
from tests.support.explorer import Exploration, Explorer
from tests.support.sabotage import Saboteur, without_barrier
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from qedfuse.disk.lookup.slices import WriteBack
    from qedfuse.disk.space.allocator import Allocator, Run
    from qedfuse.disk.space.epochs import Epoch
    from tests.support.sabotage import Sabotage

STATES: Final = share(1_500, of=3_000)
"""How many states of power failures are judged for each seed, beside all prefixes.

With the share each barrier that is needed is found with the same seed as with all.
"""
SEEDS: Final = range(12)
"""The seeds with which a violation is looked for; the first violation ends the search."""
REDUNDANT_SEEDS: Final = range(share(4, of=12))
"""The seeds with which no violation must be found.

A sabotage of a barrier that is needed is found with one of the first three, except that of
`RARE`.
"""


def without_datasync(nth: int) -> Sabotage:
    """Leave out a datasync of each write-back cycle: 1 before L2, 2 before L1, 3 at the end."""

    def sabotage(saboteur: Saboteur) -> None:
        cycle, sync = MetadataWriteback._cycle, MetadataWriteback._sync_or_give_back
        count = 0

        async def counted_cycle(self: MetadataWriteback) -> None:
            nonlocal count
            count = 0
            await cycle(self)

        async def leaky_sync(self: MetadataWriteback, writes: Sequence[WriteBack]) -> None:
            nonlocal count
            count += 1
            # The second is the last if there is no L1 entry to write.
            which = 3 if count == 2 and not writes else count
            if which != nth:
                await sync(self, writes)
            else:
                saboteur.strike()

        saboteur.replace(MetadataWriteback, "_cycle", counted_cycle)
        saboteur.replace(MetadataWriteback, "_sync_or_give_back", leaky_sync)

    return sabotage


def need_check_not_set(saboteur: Saboteur) -> None:
    """Change tables without setting NEED_CHECK first."""

    @asynccontextmanager
    async def changing(_: NeedCheck) -> AsyncIterator[None]:
        saboteur.strike()
        yield

    saboteur.replace(NeedCheck, "changing", changing)


def need_check_cleared_early(saboteur: Saboteur) -> None:
    """Clear NEED_CHECK without making everything durable first."""

    async def clear(self: NeedCheck) -> bool:
        saboteur.strike()
        l2, l1 = self._writeback._tables.take_dirty()
        await self._writeback._write(l2 + l1)
        await self._header_store.change(lambda header: header.with_need_check(value=False))
        self._writeback.note_write()
        return True

    saboteur.replace(NeedCheck, "clear", clear)


def no_quarantine(saboteur: Saboteur) -> None:
    """Make dropped clusters available immediately."""

    def retire(self: Reclaim, offset: int, length: int, _dropped_by: int) -> None:
        saboteur.strike()
        self._allocator.free_run(offset >> self._bits, length >> self._bits)

    saboteur.replace(Reclaim, "retire", retire)


def quarantine_ends_before_the_cycle(saboteur: Saboteur) -> None:
    """Make dropped clusters available when the write-back cycle begins that drops them."""
    init, began = Reclaim.__init__, Quarantine.cycle_began
    allocators: dict[Quarantine, Allocator] = {}

    def remember(self: Reclaim, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        allocators[self._quarantine] = self._allocator

    def cycle_began(self: Quarantine) -> None:
        began(self)
        self.cycle_durable()
        while (reusable := self.pop_reusable()) is not None:
            saboteur.strike()
            allocators[self].free_block(*reusable)

    saboteur.replace(Reclaim, "__init__", remember)
    saboteur.replace(Quarantine, "cycle_began", cycle_began)


def sealed_late(saboteur: Saboteur) -> None:
    """Let a write-back cycle cover clusters that were dropped while it ran."""
    durable = Quarantine.cycle_durable

    def late(self: Quarantine) -> None:
        saboteur.strike()
        self.cycle_began()
        durable(self)

    saboteur.replace(Quarantine, "cycle_durable", late)


def taken_for_never_written(saboteur: Saboteur) -> None:
    """Take clusters that are used again for new ones, which read as zeros."""
    grow_over = SpaceManager._hand_out_and_grow

    async def never_written(self: SpaceManager, first: int, count: int) -> Run:
        run = await grow_over(self, first, count)
        saboteur.strikes += not run.never_written
        return run._replace(never_written=True)

    saboteur.replace(SpaceManager, "_hand_out_and_grow", never_written)


def unwatched_scan(saboteur: Saboteur) -> None:
    """Let the scan count clusters as free that were dropped while it ran.

    Each of the two methods prevents that alone.
    """
    saboteur.replace(Marking, "record_drop", lambda *_: saboteur.strike())
    saboteur.replace(Marking, "record_change", lambda *_: None)


def epochs_always_drained(saboteur: Saboteur) -> None:
    """Do not wait for requests that may still use a dropped cluster."""
    is_drained = Epochs.is_drained

    def drained(self: Epochs, epoch: Epoch) -> bool:
        saboteur.strikes += not is_drained(self, epoch)
        return True

    saboteur.replace(Epochs, "is_drained", drained)


def early_punch(saboteur: Saboteur) -> None:
    """Punch dropped clusters while the table on the disk still refers to them."""
    cycle = MetadataWriteback._cycle

    async def punching(self: MetadataWriteback) -> None:
        quarantine = self._observer
        assert isinstance(quarantine, Quarantine)
        for first, count in quarantine._unsealed.runs():
            saboteur.strike()
            await self._file.punch((first * CLUSTER, count * CLUSTER))
        await cycle(self)

    saboteur.replace(MetadataWriteback, "_cycle", punching)


AUTO: Final = "automatic compaction within limits"


def early_punch_of_discards(saboteur: Saboteur) -> None:
    """Punch discarded clusters early, on a disk that is not compacted.

    Compaction drops clusters as well, and their content must stay readable.
    """

    async def no_compaction(_: AutoCompaction) -> None:
        pass

    early_punch(saboteur)
    saboteur.replace(AutoCompaction, "run", no_compaction)


BARRIERS: Final[dict[str, tuple[Sabotage, str, str]]] = {
    "datasync before L2": (without_datasync(1), "discards", "holds"),
    "datasync before L1": (without_datasync(2), "new tables", ""),
    "datasync at the end": (without_datasync(3), "reuse", ""),
    "NEED_CHECK set first": (need_check_not_set, "idle", "NEED_CHECK"),
    "NEED_CHECK cleared last": (need_check_cleared_early, "idle", ""),
    "quarantine": (no_quarantine, "reuse", "holds"),
    "quarantine until durable": (quarantine_ends_before_the_cycle, "slow host", "holds|wild"),
    "quarantine seals first": (sealed_late, "slow host", "holds|wild"),
    "new clusters or used ones": (taken_for_never_written, "new tables", "holds|wild|owners"),
    "scan sees changes": (unwatched_scan, "late scan on a slow host", "holds|owners"),
    "compaction: copy before entry": (without_datasync(1), "compaction", "holds"),
    "compaction: quarantine": (no_quarantine, "compaction", "holds|owners"),
    "compaction: punch after durable": (early_punch, "compaction", "holds zeros"),
    "automatic compaction: copy before entry": (without_datasync(1), AUTO, "holds"),
    "automatic compaction: quarantine": (no_quarantine, AUTO, "holds|owners"),
    "automatic compaction: punch after durable": (early_punch, AUTO, "holds zeros"),
    "epochs": (epochs_always_drained, "slow host", ""),
    "autoclear": (without_barrier(FirstWriteGuard.prepare_write), "autoclear", "autoclear"),
    "resize, before": (without_barrier(DiskGrowth.grow), "grow", "show"),
    "resize, after": (without_barrier(HeaderStore.change), "grow", "was grown"),
    "free list, list before bit": (
        without_barrier(PersistentFreeList.save, 1, 2),
        "free list",
        "free",
    ),
    "free list, dropped first": (
        without_barrier(FirstWriteGuard.prepare_write),
        "free list",
        "free",
    ),
}


RARE: Final = {"epochs": 9}
"""Barriers whose absence few seeds show, and the seed that is used first.

If that one shows nothing, because the code has changed, all seeds are used.
"""

REDUNDANT_BARRIERS: Final[dict[str, tuple[Sabotage, str]]] = {
    "discard: punch after durable": (early_punch_of_discards, "reuse"),
    "free list, bit at the end": (without_barrier(PersistentFreeList.save, 2, 2), "free list"),
}
"""Barriers whose absence no crash state shows.

A discarded cluster may read as zeros before its discard is durable, and a list that a crash
loses is only missing.
"""


def explore(name: str, sabotage: Sabotage, seeds: Iterable[int], expected: str = "") -> Exploration:
    """Run and explore a sabotaged case with each of the seeds; return the results.

    It stops at a violation, an error or a read whose message matches ``expected``.

    Raises:
        AssertionError: The sabotage has left nothing out, or one of the functions that it
            replaces was not called.
    """
    case = next(case for case in CASES if case.name == name)
    found = Exploration()
    uncalled: list[set[str]] = []
    strikes = 0
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch)
            sabotage(saboteur)
            workload = run_case(case, seed, may_fail=True)
        uncalled.append(saboteur.uncalled)
        if not saboteur.strikes:
            # The run was like one without sabotage.
            continue
        strikes += saboteur.strikes
        explorer = Explorer(name, seed, workload.history, workload.bases)
        found.misread += [*workload.history.misread, *map(str, workload.errors)]
        found.add(trio.run(explorer.explore, STATES))
        if any(re.search(expected, message) for message in messages(found)):
            break
    never_called = set.intersection(*uncalled)
    assert not never_called, f"the sabotage replaced functions that nothing calls: {never_called}"
    assert strikes, "the sabotage left nothing out"
    return found


def messages(found: Exploration) -> list[str]:
    """Return everything that was wrong, in words."""
    return found.misread + [message for _, message in found.violations.values()]


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("barrier", BARRIERS)
def test_barrier_is_needed(barrier: str) -> None:
    """Without the barrier a crash state, a read or a request breaks the promise it protects."""
    sabotage, case, expected = BARRIERS[barrier]
    first = RARE.get(barrier, 0)
    seeds = sorted(SEEDS, key=lambda seed: seed != first)
    found = explore(case, sabotage, seeds, expected)
    # With all states and ``pytest -rP`` these are the numbers of the table in docs/durability.md.
    print(f"{barrier}: {found.violated} of {found.states}: {messages(found)[:6]}")  # noqa: T201
    assert any(re.search(expected, text) for text in messages(found)), f"{found}: {messages(found)}"


@pytest.mark.parametrize("barrier", REDUNDANT_BARRIERS)
def test_barrier_is_redundant(barrier: str) -> None:
    """Without the barrier no crash state breaks a promise, so no promise may rely on it."""
    sabotage, case = REDUNDANT_BARRIERS[barrier]
    found = explore(case, sabotage, REDUNDANT_SEEDS)
    assert not found.violations, found.report()
    assert found.states > STATES


def never_strikes(saboteur: Saboteur) -> None:
    """Replace a function, and leave nothing out."""
    saboteur.replace(NeedCheck, "note_change", NeedCheck.note_change)


def uncalled_beside_a_strike(saboteur: Saboteur) -> None:
    """Leave something out, and replace one more function, which the case does not call."""
    need_check_not_set(saboteur)
    saboteur.replace(DiskGrowth, "grow", DiskGrowth.grow)


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        (never_strikes, "left nothing out"),
        (without_barrier(DiskGrowth.grow), "left nothing out"),
        (uncalled_beside_a_strike, "DiskGrowth.grow"),
        (lambda saboteur: saboteur.replace(DiskGrowth, "resizing", len), "no DiskGrowth.resizing"),
        (without_barrier(PersistentFreeList.save), "more than 1 barriers"),
    ],
    ids=["no strike", "barrier not met", "not called", "no such function", "wrong number"],
)
@pytest.mark.usefixtures("no_log")
def test_sabotage_that_removes_nothing_fails(sabotage: Sabotage, complaint: str) -> None:
    """A sabotage that does not remove the barrier it names fails, whatever the case shows."""
    case = "free list" if "barriers" in complaint else "idle"
    with pytest.raises(AssertionError, match=complaint):
        explore(case, sabotage, SEEDS)
