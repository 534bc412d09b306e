"""The ordered write-back of metadata.  The durability rules live here (docs/durability.md).

A round makes durable what was there when it began: data before the entry that makes it
visible, a new L2 table before the L1 entry that points to it (D2).  Callers that come
while a round is under way share the next one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import HostError, QedError
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qedfuse.disk.lookup.tablecache import TableCache, WriteBack
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.hostio.hostfile import HostFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WritebackStatistics:
    """How many rounds there were, and what they cost the host's disk."""

    cycles: int
    datasyncs: int
    table_writes: int


class _Cycle:
    """A round that callers wait for, and how it ended."""

    def __init__(self) -> None:
        self.done = trio.Event()
        # Until the round is known to have ended well, whoever waits must not believe so.
        self.error: QedError | None = HostError("flush: interrupted")


class MetadataWriteback:
    """Makes changes durable, in the order that the rules ask for.

    Attributes:
        failure: What ended all writing, if anything did (D7).
        reclaim: Told what a round drops and makes durable.
    """

    def __init__(self, file: HostFile, tables: TableCache, period: float) -> None:
        """Commit the tables of ``file``, every ``period`` seconds at the latest."""
        self._file = file
        self._tables = tables
        self._period = period
        self._written = 0  # changes of the file that were asked for, counted
        self._durable = 0  # the value of that counter that is known to be durable
        self._running: _Cycle | None = None
        self._waiting: _Cycle | None = None
        self._activity = trio.Event()
        self._cycles = self._datasyncs = self._table_writes = 0
        self.failure: HostError | None = None
        self.reclaim: Reclaim | None = None
        self.flushed: Callable[[], None] = lambda: None
        """Called at the end of each flush."""

    def note_write(self) -> None:
        """Note that the file or a table in memory was changed."""
        self._written += 1
        self._activity.set()

    def wake(self) -> None:
        """Have the background task look for something to do."""
        self._activity.set()

    @property
    def dirty_tables(self) -> bool:
        """Whether a table in memory differs from the file, or may."""
        return self._tables.dirty_bytes > 0 or self._running is not None

    @property
    def has_changed_tables(self) -> bool:
        """Whether any table was changed since the image was opened."""
        return self._table_writes > 0 or self.dirty_tables

    async def barrier(self) -> None:
        """Make a change of the file durable that was made just now, and all before it.

        Unlike `flush` it may be called by who holds a lock on the file's length.

        Raises:
            HostError: As `flush`.
        """
        self.note_write()
        await self._join_cycle()

    async def settle(self) -> None:
        """Return when the round that is under way has ended, well or not."""
        if self._running is not None:
            await self._running.done.wait()

    async def flush(self) -> None:
        """Return when everything written before the call is durable (D1).

        Then clusters are free that had lost their reference, and space goes back to the
        host (S3).

        Raises:
            HostError: The host could not do it.  After a failed datasync the state of
                its cache is unknown, so all later calls fail as well (D7).
        """
        await self._join_cycle()
        # A disk that was not changed is left as it is: leaks can wait for a change.
        if self._cycles and self.reclaim is not None and self.reclaim.pending:
            await self.reclaim.run()
        self.flushed()

    async def _join_cycle(self) -> None:
        """Take part in a round that makes durable what is there now."""
        self._check()
        if self._written == self._durable:
            return
        # A round that is under way may have begun before our write: join the next one.
        mine = self._waiting
        if mine is None:
            mine = self._waiting = _Cycle()
            if self._running is not None:
                previous = self._running
                with trio.CancelScope(shield=True):
                    await previous.done.wait()
            self._waiting = None
            if self._written == self._durable and self.failure is None:
                # Whatever we wait for was written before the round that has just ended.
                mine.error = None
                mine.done.set()
                return
            self._running = mine
            # A round that was begun is finished, whatever happens to who asked for it:
            # others wait for it, and half of it would leave slices pinned.
            with trio.CancelScope(shield=True):
                try:
                    await self._cycle()
                    mine.error = None
                except QedError as error:
                    mine.error = error.again()
                except BaseException as error:
                    # KeyboardInterrupt, no thread to be had, a bug: what the round had
                    # taken is neither in the file nor dirty any more.
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
        """Raise the error that ended all writing, if there was one."""
        if self.failure is not None:
            raise self.failure.again()

    async def _cycle(self) -> None:
        """Make durable what is there now."""
        self._check()
        self._cycles += 1
        target = self._written
        # Every entry in these was put there after its data had been written to the file.
        l2, l1 = self._tables.take_dirty()
        if self.reclaim is not None:
            self.reclaim.seal()
        # 1. Data, blank new tables, the file's length, and NEED_CHECK in the header: all
        #    were written before the entries were changed, so one datasync makes them
        #    durable before any entry that depends on them (D2, D3).
        await self._sync_or_give_back(l2 + l1)
        # 2. L2 entries.  Without the barrier a crash could leave an L1 entry that points
        #    to a table which still holds what the disk had there before.
        if l2:
            await self._write(l2, otherwise=l1)
            await self._sync_or_give_back(l1)
        #    (In a cluster that is used again that can be anything.)
        # 3. L1 entries make the new tables, and all they refer to, visible at once.
        if l1:
            await self._write(l1)
            await self._sync_or_give_back([])
        self._durable = max(self._durable, target)
        # Only now does no table on the disk refer to what the tables had dropped (D5).
        if self.reclaim is not None:
            self.reclaim.durable()

    async def _sync_or_give_back(self, writes: Sequence[WriteBack]) -> None:
        """Run one datasync; if it fails, nothing of ``writes`` was written."""
        try:
            self._datasyncs += 1
            await self._file.datasync()
        except HostError as error:
            # The kernel may have dropped the pages it could not write and will report
            # success the next time, so there is no trying again.
            self.failure = error.again()
            log.error("%s: the disk is read-only from now on", error)  # noqa: TRY400  no traceback
            self._give_back(writes)
            raise

    async def _write(self, writes: list[WriteBack], otherwise: Sequence[WriteBack] = ()) -> None:
        """Write table pieces; if one fails, it, the rest and ``otherwise`` stay dirty."""
        pace = Pace()
        for place, write in enumerate(writes):
            try:
                self._table_writes += 1
                await self._file.pwrite(write.offset, write.data)
            except QedError:
                self._give_back([*writes[place:], *otherwise])
                raise
            self._tables.end_write_back(write, written=True)
            await pace.step()

    def _give_back(self, writes: Sequence[WriteBack]) -> None:
        for write in writes:
            self._tables.end_write_back(write, written=False)

    async def run(self) -> None:
        """Commit what is pending, some seconds after it came up; a background task (D4)."""
        complaint = ""
        while True:
            await self._activity.wait()
            self._activity = trio.Event()
            await trio.sleep(self._period)
            try:
                await self.flush()
                complaint = ""
                if self.reclaim is not None and self.reclaim.pending:
                    self._activity.set()
            except QedError as error:
                # The next flush that somebody waits for reports it to him (D7).
                if str(error) != complaint:
                    complaint = str(error)
                    log.error("%s (while writing back tables)", error)  # noqa: TRY400
                if self.failure is not None:
                    return
                self._activity.set()

    def statistics(self) -> WritebackStatistics:
        """Tell what the rounds so far have cost."""
        return WritebackStatistics(self._cycles, self._datasyncs, self._table_writes)
