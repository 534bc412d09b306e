"""Judges what a crash has left: whether the tables are sound and the disk holds what it may.

Independent of the code under test, and quick: tables are looked at once per combination
of their sectors, data by comparing arrays of numbers.  `tests.support.explorer` has a
sample of its verdicts confirmed by the checks of this project and of QEMU.
"""

from __future__ import annotations

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
    from tests.support.crashrecording import CrashPoint, Ids, SectorContents, State
    from tests.support.history import History

    Places = NDArray[np.intp]

_SHOWN: Final = 3
"""How many sectors of a disk are named that hold something wrong."""


def _none() -> Places:
    return np.empty(0, np.intp)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a state: sound or not, and where the disk's clusters are.

    Attributes:
        errors: What is wrong, in words; the rest means nothing if there is any.
        owned: Which whole clusters of the file something refers to.
        sectors: The sectors of the file that hold tables.
        guest: The guest clusters that have a place in the file.
        file: The first sector of each in the file.
        blank: The guest clusters that have a zero entry.
        bare: The guest clusters that have no entry.
    """

    errors: tuple[str, ...]
    owned: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    sectors: Places = field(default_factory=_none)
    guest: Places = field(default_factory=_none)
    file: Places = field(default_factory=_none)
    blank: Places = field(default_factory=_none)
    bare: Places = field(default_factory=_none)

    @property
    def leaks(self) -> int:
        """How many whole clusters of the file nothing refers to."""
        return int((~self.owned).sum())


class CrashOracle:
    """Judges states of one recording."""

    def __init__(self, history: History, contents: SectorContents, initial: Ids) -> None:
        """Judge by what a history promised; ``initial`` is how the file began."""
        self._history = history
        self._contents = contents
        first = header_of(history.file.initial)
        self._geometry = first.geometry
        self._l1 = (first.l1_table_offset // SECTOR, first.l1_end // SECTOR)
        self._per_cluster = first.cluster_size // SECTOR
        self._within = np.arange(self._per_cluster)
        self._headers: dict[int, Header] = {}
        self._known: dict[tuple[int, int, bytes, bytes], Tables] = {}
        self._places: dict[bytes, tuple[list[tuple[int, int]], Places | None]] = {}
        self._below: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self._zeros: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self._initial = initial
        self._bound = max(
            len(history.file.initial),
            first.geometry.bound(first.header_end, history.sectors * SECTOR),
        )

    def header(self, state: State) -> Header:
        """Read the header of a state."""
        content = int(state.ids[0])
        known = self._headers.get(content)
        if known is None:
            known = self._headers[content] = header_of(self._contents.words[content].tobytes())
        return known

    def tables(self, state: State) -> Tables:
        """Read the tables of a state, and see whether they are sound."""
        begin, end = self._l1
        l1 = state.ids[begin:end].tobytes()
        places = self._places.get(l1)
        if places is None:
            places = self._places[l1] = self._find(state)
        _, sectors = places
        ids = (
            b""
            if sectors is None or sectors[-1] >= len(state.ids)
            else state.ids[sectors].tobytes()
        )
        key = (self.header(state).image_size, state.length, l1, ids)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._read(state, places[0])
        return known

    def _find(self, state: State) -> tuple[list[tuple[int, int]], Places | None]:
        """Find the L2 tables, and the sectors of all that look right at first sight, sorted."""
        if self._l1[1] * SECTOR > state.length:
            return [], None
        l1 = self._entries(state, *self._l1)
        tables = [(index, int(l1[index])) for index in np.flatnonzero(l1).tolist()]
        most = 1 << 40
        size = self._geometry.table_bytes // SECTOR
        rows = [place // SECTOR + np.arange(size) for _, place in tables if place < most]
        return tables, np.sort(np.concatenate(rows)) if rows else None

    def _entries(self, state: State, begin: int, end: int) -> NDArray[np.uint64]:
        return self._entries_of(state.ids[begin:end])

    def _entries_of(self, ids: Ids) -> NDArray[np.uint64]:
        return self._contents.words[ids].ravel()

    def _read(self, state: State, tables: Sequence[tuple[int, int]]) -> Tables:
        """Check all that the tables refer to."""
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
        for index, place in tables:
            if place % size or place < header.header_end or place + geometry.table_bytes > length:
                errors.append(f"L1 entry {index} is wild: {place}")
                continue
            first, last = place // size, (place + geometry.table_bytes) // size
            owners[first:last] += 1
            begin, end = place // SECTOR, (place + geometry.table_bytes) // SECTOR
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
            for cluster in guest[wild][:_SHOWN].tolist()
        ]
        owners += np.bincount((values[~wild] // size).astype(np.intp), minlength=clusters)
        if clusters and owners.max() > 1:
            shared = np.flatnonzero(owners > 1)[:_SHOWN] * size
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

    def problems(self, point: CrashPoint, state: State) -> list[str]:
        """Judge a state that a moment can leave; an empty list is good."""
        tables = self.tables(state)
        if tables.errors:
            return list(tables.errors)
        header = self.header(state)
        problems = []
        least = self._history.least_size(point.count)
        if header.image_size < least:
            return [f"the disk has {header.image_size} bytes, and was grown to {least}"]
        if state.length > self._bound:
            problems.append(f"the file has {state.length} bytes, and needs at most {self._bound}")
        if header.stale_autoclear:
            # Whoever owns those bits must be able to tell that nothing was changed.
            both = min(len(state.ids), len(self._initial))
            if (state.ids[1:both] != self._initial[1:both]).any():
                problems.append("a change while autoclear bits may be set")
        if header.free_list:
            content = self._contents.content(state)
            problems += free_list_problems(content, header, tables.owned)
        problems += self._early(point, state, tables)
        return problems + self._wrong_data(
            self._history.flushed(point.count), header, state, tables
        )

    def _early(self, point: CrashPoint, state: State, tables: Tables) -> list[str]:
        """Find what may be there although what must come first may not be (D2, D3)."""
        not_durable = point.not_durable[point.not_durable < len(state.ids)]
        if not len(not_durable):
            return []
        problems = []
        moving = np.zeros(len(state.ids), np.bool_)
        moving[not_durable] = True
        if not self.header(state).need_check and moving[tables.sectors].any():
            problems.append("tables change while NEED_CHECK may be clear")
        begin, end = self._l1
        if moving[begin:end].any():
            before = self._entries_of(point.durable[begin:end])
            now = self._entries_of(state.ids[begin:end])
            size = self._geometry.table_bytes
            problems += [
                f"an L1 entry may be there before its table at {place}"
                for place in now[now != before].tolist()
                if place and moving[place // SECTOR : (place + size) // SECTOR].any()
            ]
        return problems

    def _wrong_data(self, flushed: int, header: Header, state: State, tables: Tables) -> list[str]:
        """Find the sectors of the disk that hold what they must not."""
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
                problems += [
                    f"sector {sector} holds {describe(stamp)} (after flush {flushed})"
                    for sector, stamp in zip(
                        guest[wrong][:_SHOWN].tolist(), found[wrong][:_SHOWN].tolist(), strict=True
                    )
                ]
        key = (flushed, size)
        if key not in self._zeros:
            below = np.zeros(size, np.uint64)
            base = self._history.below[:size]
            below[: len(base)] = base
            self._below[key] = self._refused(flushed, below)
            self._zeros[key] = self._refused(flushed, np.zeros(size, np.uint64))
        for what, clusters, refused in (
            ("what is below", tables.bare, self._below[key]),
            ("zeros", tables.blank, self._zeros[key]),
        ):
            wrong = refused[clusters]
            if wrong.any():
                where = clusters[wrong][:_SHOWN].tolist()
                problems.append(f"clusters {where} show {what} (after flush {flushed})")
        return problems

    def _refused(self, flushed: int, held: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which clusters of the disk must not hold what ``held`` says."""
        size = len(held)
        wrong = np.zeros(-(-size // self._per_cluster) * self._per_cluster, np.bool_)
        wrong[:size] = self._history.allowed(flushed).refuses(np.arange(size), held)
        clusters: NDArray[np.bool_] = wrong.reshape(-1, self._per_cluster).max(axis=1)
        return clusters
