"""Ordered write-back of the tables, so that every state after a crash is consistent.

Requests change the tables in memory, and a *cycle* writes the changes to the file, in the order of
docs/durability.md, whose rules have the names D1, D2 and so on.  Cycles are a group commit: all
callers that arrive while a cycle is running share the next cycle.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from qedfuse.errors import HostError, QedError
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.disk.lookup.slices import WriteBack
    from qedfuse.disk.lookup.tablecache import TableCache
    from qedfuse.hostio.hostfile import HostFile

log = logging.getLogger(__name__)

_MAX_INLINE_SLICES: Final = 4
"""Maximum number of dirty slices that a cycle writes in the event loop, without waiting."""


@dataclass(frozen=True, slots=True)
class WritebackStatistics:
    """Counters since the image was opened.

    Attributes:
        cycles: Write-back cycles that have begun.
        datasyncs: Calls of fdatasync(2) in the cycles.
        table_writes: Writes of parts of tables in the cycles.
    """

    cycles: int
    datasyncs: int
    table_writes: int


class CycleObserver(Protocol):
    """The interface of an object that must know which changes of the tables a cycle covers."""

    def cycle_began(self) -> None:
        """Note that a cycle has taken the changes of the tables up to now.

        No other task runs between the taking and this call.
        """

    def cycle_durable(self) -> None:
        """Note that the changes which the running cycle took are durable.

        Not called for a failed cycle: the next one that succeeds also covers its changes.
        """


class _Cycle:
    """A cycle that callers wait for.

    Attributes:
        done: Set when the cycle has ended.
        error: Why the cycle failed; None if it succeeded.  Meaningless before ``done``.
    """

    def __init__(self) -> None:
        self.done = trio.Event()
        # Cleared only after success, so that callers get an error after an unforeseen exception.
        self.error: QedError | None = HostError("flush: interrupted")


class MetadataWriteback:
    """Makes changes of one image durable, in the order that the durability rules demand.

    Attributes:
        failure: The error that made the disk read-only (D7); None if no error has done so.
        cycles: How many cycles have begun.
    """

    def __init__(self, file: HostFile, tables: TableCache, observer: CycleObserver) -> None:
        """Write back ``tables`` to ``file``, and notify ``observer`` of each cycle."""
        self._file = file
        self._tables = tables
        self._observer = observer
        # How many changes there were, and how many of them, from the first on, are durable.
        self._changes = 0
        self._durable_changes = 0
        # The cycle that runs now, and the next one, which callers can still join.
        self._running: _Cycle | None = None
        self._waiting: _Cycle | None = None
        self._activity = trio.Event()
        self._is_active = False  # whether `_activity` is set
        # Whether a table was written that no datasync has made durable yet.
        self._has_unsynced_tables = False
        self._datasyncs = self._table_writes = 0
        self.cycles = 0
        self.failure: HostError | None = None

    def note_write(self) -> None:
        """Note that the file, or a table in memory, was changed, and that a cycle must follow."""
        self._changes += 1
        if not self._is_active:  # without a call of `Event.set` for each write
            self.wake()

    def wake(self) -> None:
        """Let `wait_for_activity` return, even if nothing was changed."""
        self._is_active = True
        self._activity.set()

    async def wait_for_activity(self) -> None:
        """Wait until `note_write` or `wake` was called since the last return; for one task only."""
        await self._activity.wait()
        self._activity = trio.Event()
        self._is_active = False

    @property
    def dirty_tables(self) -> bool:
        """Whether a table in memory differs from what is durable, or may, because a cycle runs."""
        return (
            self._tables.dirty_bytes > 0 or self._has_unsynced_tables or self._running is not None
        )

    @property
    def has_changed_tables(self) -> bool:
        """Whether any table was changed since opening; also True while a cycle is running."""
        return self._table_writes > 0 or self.dirty_tables

    async def barrier(self) -> None:
        """Make durable all changes of the file so far, even those without a call of `note_write`.

        The caller may hold any lock.

        Raises:
            HostError: See `write_back`.
        """
        self.note_write()
        await self.write_back()

    async def wait_running(self) -> None:
        """Wait for the end of the running cycle, if any, whether it succeeds or fails."""
        if self._running is not None:
            await self._running.done.wait()

    def try_write_back(self) -> bool:
        """Make everything written so far durable without waiting; return whether that succeeded.

        After False the caller must use `write_back`, which raises the host's error, if any.  A
        failed datasync makes the disk read-only.
        """
        if (
            self.failure is not None
            or self._running is not None
            or self._waiting is not None
            or not self._tables.has_few_dirty(_MAX_INLINE_SLICES)
        ):
            return False
        if self._changes == self._durable_changes:
            return True
        try:
            return self._try_cycle()
        except HostError as error:
            self._become_read_only(error)
            return False

    def _try_cycle(self) -> bool:
        """Run a cycle without waiting; return False if it cannot be completed.

        After False, what was not written is dirty again, and what was written need not be durable.
        The next cycle makes everything durable.
        """
        # This method awaits nothing, so nothing changes between its steps.  So the first datasync
        # covers all that the tables refer to, although the tables are taken after it.
        if not self._file.try_datasync():
            return False
        self.cycles += 1
        self._datasyncs += 1
        l2, _ = self._tables.take_dirty()
        self._observer.cycle_began()
        for index, write in enumerate(l2):
            if not self._file.try_write(write.offset, write.data):
                self._give_back(l2[index:])
                return False
            self._table_writes += 1
            self._has_unsynced_tables = True
            self._tables.end_write_back(write, written=True)
        if l2:
            if not self._file.try_datasync():
                return False
            self._datasyncs += 1
        self._durable_changes = self._changes
        self._has_unsynced_tables = False
        self._observer.cycle_durable()
        return True

    async def write_back(self) -> None:
        """Return when everything written before the call is durable (D1).

        Raises:
            HostError: A system call failed.  After a failed write the next call tries again.  After
                a failed datasync (D7), or an unforeseen exception, all later calls fail as well.
        """
        self._check()
        if self._changes == self._durable_changes:
            return
        # A running cycle may have begun before the caller's write, and then does not cover it.
        # So wait for the next cycle, and run it if no other caller will.
        mine = self._waiting
        if mine is None:
            mine = self._waiting = _Cycle()
            if self._running is not None:
                previous = self._running
                # Other callers may join the new cycle meanwhile, and only this task will run it.
                # So this task must not be cancelled here.
                with trio.CancelScope(shield=True):
                    await previous.done.wait()
            self._waiting = None
            if self._changes == self._durable_changes and self.failure is None:
                # The previous cycle has covered the writes of all who wait for the new one.
                mine.error = None
                mine.done.set()
                return
            self._running = mine
            # Other callers wait for the cycle, and a cycle that stopped half-way would leave
            # slices pinned.  So it runs to its end even if this task is cancelled.
            with trio.CancelScope(shield=True):
                try:
                    await self._cycle()
                    mine.error = None
                except QedError as error:
                    mine.error = error.again()
                except BaseException as error:
                    # KeyboardInterrupt, a lack of memory, or a bug.  The changes that the cycle
                    # took may be neither in the file nor dirty, so no later cycle would write
                    # them.  Hence the disk becomes read-only.
                    why = f"{self._file.name}: flush: ended by {type(error).__name__}"
                    self.failure = HostError(why)
                    raise
                finally:
                    self._running = None
                    mine.done.set()
        else:
            await mine.done.wait()
        if mine.error is not None:
            raise mine.error.again()

    def _check(self) -> None:
        """Raise the error that made the disk read-only, if any."""
        if self.failure is not None:
            raise self.failure.again()

    async def _cycle(self) -> None:
        """Make all changes so far durable; after an error, unwritten slices are dirty again."""
        self._check()
        self.cycles += 1
        # No await from here to `cycle_began`: the counter, the dirty slices and what the observer
        # notes must describe the same moment.  Otherwise a change could count as durable without
        # having been written.
        target = self._changes
        l2, l1 = self._tables.take_dirty()
        self._observer.cycle_began()
        # 1. Data, zeroed new tables, the file's length, and NEED_CHECK in the header.  All were
        #    written before the entries were changed, so one datasync makes them durable before
        #    any entry that depends on them (D2, D3).
        await self._sync_or_give_back(l2 + l1)
        # 2. L2 entries.  The datasync makes them durable before the L1 entries are written,
        #    because a table must be complete before it becomes visible (D2).
        if l2:
            await self._write(l2, dependents=l1)
            await self._sync_or_give_back(l1)
        # 3. L1 entries, which make the new tables visible.
        if l1:
            await self._write(l1)
            await self._sync_or_give_back([])
        self._durable_changes = max(self._durable_changes, target)
        self._has_unsynced_tables = False
        # From here on no table in the file refers to the clusters whose references the cycle
        # has removed.  So the observer may begin to release these clusters (D5).
        self._observer.cycle_durable()

    async def _sync_or_give_back(self, writes: Sequence[WriteBack]) -> None:
        """Run one datasync; if it fails, the disk is read-only, and ``writes`` are dirty again."""
        try:
            self._datasyncs += 1
            await self._file.datasync()
        except HostError as error:
            self._become_read_only(error)
            self._give_back(writes)
            raise

    def _become_read_only(self, error: HostError) -> None:
        """Make the disk read-only, because a datasync has failed.

        The kernel may have dropped the pages that it could not write.  Then the next datasync
        would succeed without them, so a retry would prove nothing.
        """
        self.failure = error.again()
        log.error("%s: the disk is read-only from now on", error)

    async def _write(self, writes: list[WriteBack], dependents: Sequence[WriteBack] = ()) -> None:
        """Write slices; after an error, the unwritten ones and ``dependents`` are dirty again."""
        pace = Pace()
        for index, write in enumerate(writes):
            try:
                self._table_writes += 1
                await self._file.pwrite(write.offset, write.data)
            except QedError:
                self._give_back([*writes[index:], *dependents])
                raise
            self._has_unsynced_tables = True
            self._tables.end_write_back(write, written=True)
            await pace.step()

    def _give_back(self, writes: Sequence[WriteBack]) -> None:
        """Make dirty again the changes that the cycle has taken but not written."""
        for write in writes:
            self._tables.end_write_back(write, written=False)

    def statistics(self) -> WritebackStatistics:
        """Return the counters of all cycles so far."""
        return WritebackStatistics(self.cycles, self._datasyncs, self._table_writes)
