"""The test oracle for crash states: judges the tables and the content of the disk.

It is independent of the code under test, and quick: it reads the tables once for each
combination of their sectors, and compares data as arrays of numbers.  `tests.support.explorer`
confirms a sample of its verdicts by the project's check and by QEMU's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from tests.support.disks import header_of
from tests.support.freelistoracle import free_list_problems
from tests.support.history import describe
from tests.support.hostfiles import SECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from qedfuse.ondisk.header import Header
    from tests.support.crashrecording import Ids, PowerFailure, SectorContents, State
    from tests.support.history import History

    Numbers = NDArray[np.intp]
    """Numbers of sectors or of clusters."""

_MAX_SHOWN: Final = 3
"""How many of the wrong sectors, entries or clusters a problem names."""

_MAX_CACHED_TABLE_OFFSET: Final = 1 << 40
"""L2 tables past this offset in bytes, which no file here reaches, are not looked up."""


def _none() -> Numbers:
    return np.empty(0, np.intp)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a state: whether they are sound, and where the disk's clusters are.

    Attributes:
        errors: What is wrong, in words; if anything is, the other attributes are undefined.
        owned: For each whole cluster of the file, whether the header or a table refers to it.
        sectors: The sectors of the file that hold tables.
        guest: The guest clusters that are allocated.
        file: The first sector in the file of each cluster in `guest`.
        zero: The guest clusters with a zero entry.
        unallocated: The guest clusters without an entry.
    """

    errors: tuple[str, ...]
    owned: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    sectors: Numbers = field(default_factory=_none)
    guest: Numbers = field(default_factory=_none)
    file: Numbers = field(default_factory=_none)
    zero: Numbers = field(default_factory=_none)
    unallocated: Numbers = field(default_factory=_none)

    @property
    def leaks(self) -> int:
        """How many whole clusters of the file nothing refers to."""
        return int((~self.owned).sum())


class CrashOracle:
    """Judges crash states of one recording."""

    def __init__(self, history: History, contents: SectorContents, initial: Ids) -> None:
        """Judge by what ``history`` promised.

        ``contents`` gives the content numbers of the states their meaning; ``initial`` are those
        of the file before the first change.
        """
        self._history = history
        self._contents = contents
        first = header_of(history.file.initial)
        self._geometry = first.geometry
        self._l1 = (first.l1_table_offset // SECTOR, first.l1_end // SECTOR)
        self._per_cluster = first.cluster_size // SECTOR
        self._within = np.arange(self._per_cluster)
        self._headers: dict[int, Header] = {}
        self._tables: dict[tuple[int, int, bytes, bytes], Tables] = {}
        self._l2_tables: dict[bytes, tuple[list[tuple[int, int]], Numbers | None]] = {}
        # Which guest clusters must not show the base, and which must not show zeros, after a
        # flush and for a size of the disk.
        self._base_refused: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self._zeros_refused: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self._promises: dict[int, tuple[int, int]] = {}
        self._initial = initial
        self._bound = max(
            len(history.file.initial),
            first.geometry.bound(first.header_end, history.sectors * SECTOR),
        )

    def promises(self, prefix: int) -> tuple[int, int]:
        """Return what was promised after ``prefix`` changes, as `History.promises` does."""
        found = self._promises.get(prefix)
        if found is None:
            found = self._promises[prefix] = self._history.promises(prefix)
        return found

    def header(self, state: State) -> Header:
        """Return the header of a state."""
        content = int(state.ids[0])
        known = self._headers.get(content)
        if known is None:
            known = self._headers[content] = header_of(self._contents.words[content].tobytes())
        return known

    def tables(self, state: State) -> Tables:
        """Return the tables of a state; equal tables are read once."""
        begin, end = self._l1
        l1 = state.ids[begin:end].tobytes()
        found = self._l2_tables.get(l1)
        if found is None:
            found = self._l2_tables[l1] = self._find_l2_tables(state)
        l2_tables, sectors = found
        ids = (
            b""
            if sectors is None or sectors[-1] >= len(state.ids)
            else state.ids[sectors].tobytes()
        )
        key = (self.header(state).image_size, state.length, l1, ids)
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = self._read(state, l2_tables)
        return tables

    def _find_l2_tables(self, state: State) -> tuple[list[tuple[int, int]], Numbers | None]:
        """Return the L2 tables as (L1 index, file offset), and the sectors they lie in, sorted.

        The sectors, None if there are none, are those of tables up to a plausible offset.
        """
        if self._l1[1] * SECTOR > state.length:
            return [], None
        l1 = self._entries(state, *self._l1)
        tables = [(index, int(l1[index])) for index in np.flatnonzero(l1).tolist()]
        size = self._geometry.table_bytes // SECTOR
        rows = [
            offset // SECTOR + np.arange(size)
            for _, offset in tables
            if offset < _MAX_CACHED_TABLE_OFFSET
        ]
        return tables, np.sort(np.concatenate(rows)) if rows else None

    def _entries(self, state: State, begin: int, end: int) -> NDArray[np.uint64]:
        return self._entries_of(state.ids[begin:end])

    def _entries_of(self, ids: Ids) -> NDArray[np.uint64]:
        return self._contents.words[ids].ravel()

    def _read(self, state: State, tables: Sequence[tuple[int, int]]) -> Tables:
        """Read L2 tables, given as (L1 index, file offset), and check all that they refer to."""
        geometry, header = self._geometry, self.header(state)
        size, length = geometry.cluster_size, state.length
        clusters = length // size
        l1_begin, l1_end = self._l1
        if l1_end * SECTOR > length:
            return Tables(("the L1 table is not inside the file",))
        errors: list[str] = []
        owners = np.zeros(clusters, np.intp)
        owners[: header.header_end // size] += 1
        owners[header.l1_table_offset // size : header.l1_end // size] += 1
        entries = np.zeros(
            max(geometry.l1_used(header.image_size), *(index + 1 for index, _ in tables), 1)
            * geometry.entries,
            np.uint64,
        )
        sectors = [np.arange(l1_begin, l1_end)]
        for index, offset in tables:
            table_end = offset + geometry.table_bytes
            if offset % size or offset < header.header_end or table_end > length:
                errors.append(f"L1 entry {index} is wild: {offset}")
                continue
            owners[offset // size : table_end // size] += 1
            begin, end = offset // SECTOR, table_end // SECTOR
            sectors.append(np.arange(begin, end))
            at = index * geometry.entries
            entries[at : at + geometry.entries] = self._entries(state, begin, end)
        guest = np.flatnonzero(entries > ZERO)
        values = entries[guest]
        wild = (
            (values % size != 0) | (values < header.header_end) | (values > max(0, length - size))
        )
        errors += [
            f"the L2 entry of cluster {cluster} is wild: {entries[cluster]}"
            for cluster in guest[wild][:_MAX_SHOWN].tolist()
        ]
        owners += np.bincount((values[~wild] // size).astype(np.intp), minlength=clusters)
        if clusters and owners.max() > 1:
            shared = np.flatnonzero(owners > 1)[:_MAX_SHOWN] * size
            errors.append(f"clusters with two owners at {shared.tolist()}")
        used = geometry.clusters(header.image_size)
        inside = ~wild & (guest < used)
        return Tables(
            tuple(errors),
            owners > 0,
            np.concatenate(sectors),
            guest[inside],
            (values[inside] // SECTOR).astype(np.intp),
            np.flatnonzero(entries[:used] == ZERO),
            np.flatnonzero(entries[:used] == UNALLOCATED),
        )

    def problems(self, prefix: int, state: State, failure: PowerFailure | None = None) -> list[str]:
        """Return which promises a state after ``prefix`` changes breaks; empty if it breaks none.

        ``failure`` is the power failure that leaves the state, None if the process was killed.
        """
        tables = self.tables(state)
        if tables.errors:
            return list(tables.errors)
        header = self.header(state)
        problems = []
        flushed, least = self.promises(prefix)
        if header.image_size < least:
            return [f"the disk has {header.image_size} bytes, and was grown to {least}"]
        if state.length > self._bound:
            problems.append(f"the file has {state.length} bytes, and needs at most {self._bound}")
        if header.stale_autoclear:
            # A program that sets the bits relies on finding them cleared after any change.
            both = min(len(state.ids), len(self._initial))
            if (state.ids[1:both] != self._initial[1:both]).any():
                problems.append("a change while autoclear bits may be set")
        if header.has_free_list:
            content = self._contents.content(state)
            problems += free_list_problems(content, header, tables.owned)
        if failure is not None:
            problems += self._out_of_order(failure, state, tables)
        return problems + self._wrong_data(flushed, header, state, tables)

    def _out_of_order(self, failure: PowerFailure, state: State, tables: Tables) -> list[str]:
        """Return which writes may be durable before a write that must precede them (D2, D3).

        Two sectors that are both not durable can reach the disk in either order.
        """
        sectors = failure.not_durable[failure.not_durable < len(state.ids)]
        if not len(sectors):
            return []
        problems = []
        not_durable = np.zeros(len(state.ids), np.bool_)
        not_durable[sectors] = True
        if not self.header(state).need_check and not_durable[tables.sectors].any():
            problems.append("tables change while NEED_CHECK may be clear")
        begin, end = self._l1
        if not_durable[begin:end].any():
            before = self._entries_of(failure.durable[begin:end])
            now = self._entries_of(state.ids[begin:end])
            size = self._geometry.table_bytes
            problems += [
                f"an L1 entry may be there before its table at {offset}"
                for offset in now[now != before].tolist()
                if offset and not_durable[offset // SECTOR : (offset + size) // SECTOR].any()
            ]
        return problems

    def _wrong_data(self, flushed: int, header: Header, state: State, tables: Tables) -> list[str]:
        """Return which sectors of the disk hold what they must not after a flush."""
        allowed = self._history.allowed(flushed)
        size = header.image_size // SECTOR
        problems = []
        if len(tables.guest):
            guest = tables.guest[:, np.newaxis] * self._per_cluster + self._within
            file = tables.file[:, np.newaxis] + self._within
            found = self._contents.stamps[state.ids[file]]
            inside = guest < size
            wrong = inside & allowed.refuses(np.where(inside, guest, 0), found)
            if wrong.any():
                shown = zip(guest[wrong].tolist(), found[wrong].tolist(), strict=True)
                problems += [
                    f"sector {sector} holds {describe(stamp)} (after flush {flushed})"
                    for sector, stamp in itertools.islice(shown, _MAX_SHOWN)
                ]
        key = (flushed, size)
        if key not in self._zeros_refused:
            below = np.zeros(size, np.uint64)
            base = self._history.below[:size]
            below[: len(base)] = base
            self._base_refused[key] = self._refused(flushed, below)
            self._zeros_refused[key] = self._refused(flushed, np.zeros(size, np.uint64))
        for what, clusters, refused in (
            ("the base", tables.unallocated, self._base_refused[key]),
            ("zeros", tables.zero, self._zeros_refused[key]),
        ):
            wrong = refused[clusters]
            if wrong.any():
                where = clusters[wrong][:_MAX_SHOWN].tolist()
                problems.append(f"clusters {where} show {what} (after flush {flushed})")
        return problems

    def _refused(self, flushed: int, held: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each cluster of the disk whether the stamps in ``held`` are not allowed there.

        ``held`` has a stamp for each sector of the disk.
        """
        size = len(held)
        wrong = np.zeros(-(-size // self._per_cluster) * self._per_cluster, np.bool_)
        wrong[:size] = self._history.allowed(flushed).refuses(np.arange(size), held)
        clusters: NDArray[np.bool_] = wrong.reshape(-1, self._per_cluster).max(axis=1)
        return clusters
