"""A recording cut into sectors, and the states that a power failure can make of it.

A disk writes sectors, each whole or not at all.  Every content that a sector ever had
gets a number; a state of the file is an array of such numbers and a length.  That makes
a state cheap: a hundred thousand of them are looked at in a test.

What a state holds: everything that was there when the last datasync that has ended
began.  Of what came later, each sector on its own is as it was at some time since then,
and the file's length, on its own as well, too: writes, cuts and punches are lost or kept
in any subset and any order, and what lies past the end that was kept is lost with it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

from tests.support.hostfiles import SECTOR, Punch, Sync, Truncate, Write

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tests.support.hostfiles import Change, RecordingFile

    Ids: TypeAlias = NDArray[np.int32]

WORDS: Final = SECTOR // 8
MIXED: Final = (1 << 64) - 1
"""Stands for a sector that does not hold one number."""

MAX_EXHAUSTIVE_STATES: Final = 512
"""Up to this many states, all that a moment can leave are looked at."""


class State(NamedTuple):
    """A file: what its sectors hold, as numbers of contents, and its length in bytes."""

    ids: Ids
    length: int


class SectorContents:
    """Every content that a sector ever had; number 0 is zeros."""

    def __init__(self) -> None:
        """Know zeros only."""
        self._ids: dict[bytes, int] = {bytes(SECTOR): 0}
        self._words: NDArray[np.uint64] | None = None
        self._stamps: NDArray[np.uint64] | None = None

    def number(self, data: bytes) -> int:
        """Give the number of a content."""
        return self._ids.setdefault(data, len(self._ids))

    @property
    def words(self) -> NDArray[np.uint64]:
        """All contents, a row of words each."""
        if self._words is None or len(self._words) < len(self._ids):
            self._words = np.frombuffer(b"".join(self._ids), "<u8").reshape(-1, WORDS)
        return self._words

    @property
    def stamps(self) -> NDArray[np.uint64]:
        """For each content the number that it repeats, or `MIXED`."""
        if self._stamps is None or len(self._stamps) < len(self._ids):
            words = self.words
            same = (words == words[:, :1]).all(axis=1)
            self._stamps = np.where(same, words[:, 0], np.uint64(MIXED))
        return self._stamps

    def content(self, state: State) -> bytes:
        """Give the bytes of a file."""
        return self.words[state.ids].tobytes()[: state.length]


@dataclass(frozen=True, slots=True)
class Step:
    """What one change did: the sectors it changed, what they held then, and the length.

    Attributes:
        durable: For a sync, how many changes it made durable.
    """

    sectors: Ids
    ids: Ids
    length: int
    durable: int | None = None


_NONE: Final[Ids] = np.empty(0, np.int32)


class CrashRecording:
    """A recording, as steps of sectors."""

    def __init__(self, file: RecordingFile, contents: SectorContents | None = None) -> None:
        """Cut the recording of a file."""
        self.contents = contents or SectorContents()
        self._bytes = bytearray(file.initial)
        self._length = len(file.initial)
        ends = [len(file.initial)]
        ends += [change.size for change in file.changes if isinstance(change, Truncate)]
        ends += [c.offset + len(c.data) for c in file.changes if isinstance(c, Write)]
        self.most = -(-max(ends) // SECTOR)
        self._bytes.extend(bytes(self.most * SECTOR - len(self._bytes)))
        number = self.contents.number
        step = SECTOR
        self.initial = State(
            np.array(
                [
                    number(bytes(self._bytes[at : at + step]))
                    for at in range(0, len(self._bytes), step)
                ],
                np.int32,
            ),
            self._length,
        )
        self.steps = [self._step(at, change) for at, change in enumerate(file.changes)]

    def _step(self, at: int, change: Change) -> Step:
        """Carry out one change."""
        if isinstance(change, Sync):
            return Step(_NONE, _NONE, self._length, at - change.missed)
        if isinstance(change, Write):
            start, end = change.offset, change.offset + len(change.data)
            self._bytes[start:end] = change.data
            self._length = max(self._length, end)
        elif isinstance(change, Punch):
            start, end = change.offset, min(change.offset + change.length, self._length)
            self._bytes[start:end] = bytes(max(0, end - start))
        else:
            start, end = change.size, max(self._length, change.size)
            self._bytes[start:end] = bytes(end - start)
            end = max(start, self._length)
            self._length = change.size
        if end <= start:
            return Step(_NONE, _NONE, self._length)
        first, last = start // SECTOR, -(-end // SECTOR)
        held = bytes(self._bytes[first * SECTOR : last * SECTOR])
        ids = [self.contents.number(held[n : n + SECTOR]) for n in range(0, len(held), SECTOR)]
        return Step(np.arange(first, last, dtype=np.int32), np.array(ids, np.int32), self._length)

    def crash_points(self) -> Iterator[CrashPoint]:
        """Show the recording after each number of changes."""
        durable, now = self.initial.ids.copy(), self.initial.ids.copy()
        done = 0
        lengths = [self.initial.length, *(step.length for step in self.steps)]
        for count in range(len(self.steps) + 1):
            if count:
                step = self.steps[count - 1]
                now[step.sectors] = step.ids
                for made in self.steps[done : step.durable or 0]:
                    durable[made.sectors] = made.ids
                done = max(done, step.durable or 0)
            yield CrashPoint(
                count,
                durable,
                now,
                lengths[done : count + 1],
                self.steps[done:count],
                self.contents,
            )


class Choice(NamedTuple):
    """Which version each sector has that can have several, and the file's length."""

    versions: NDArray[np.intp]
    length: int


class CrashPoint:
    """The file after some changes, of which the latest are not durable.

    Attributes:
        count: How many changes there were.
        durable: What each sector held when the last datasync ended.
        flying: The sectors that can hold one of several contents.
        contents: What the numbers of contents mean.
    """

    def __init__(
        self,
        count: int,
        durable: Ids,
        now: Ids,
        lengths: Sequence[int],
        steps: Sequence[Step],
        contents: SectorContents,
    ) -> None:
        """Wrap arrays that change when the film goes on."""
        self.count = count
        self.contents = contents
        self.durable = durable
        self._now = now
        self._lengths = list(dict.fromkeys(reversed(lengths)))
        self._all_lengths = lengths
        self._steps = steps
        self.not_durable: Ids = _NONE

    def prefix(self) -> State:
        """Give the file as whoever kills the process leaves it."""
        length = self._all_lengths[-1]
        return State(self._now[: -(-length // SECTOR)].copy(), length)

    def develop(self) -> None:
        """Work out the versions of each sector; call it before `choices` and `state`."""
        rows: dict[int, list[int]] = {}
        # For each step: the rows of its sectors, and the versions that it made of them.
        self._made: list[tuple[list[int], list[int]]] = []
        order: dict[int, int] = {}
        for step in self._steps:
            places, versions = [], []
            for sector, content in zip(step.sectors.tolist(), step.ids.tolist(), strict=True):
                known = rows.get(sector)
                if known is None:
                    known = rows[sector] = [int(self.durable[sector])]
                    order[sector] = len(order)
                if known[-1] != content:
                    known.append(content)
                places.append(order[sector])
                versions.append(len(known) - 1)
            self._made.append((places, versions))
        counts = [len(versions) for versions in rows.values()]
        self._counts = np.array(counts, np.intp)
        self.not_durable = np.array(list(rows), np.int32)
        self._versions = np.zeros((len(rows), max(counts, default=1)), np.int32)
        for row, known in enumerate(rows.values()):
            self._versions[row, : len(known)] = known
        self._rows = np.arange(len(rows))

    @property
    def states(self) -> int:
        """How many states there can be, all told."""
        return math.prod(int(count) for count in self._counts) * len(self._lengths)

    def state(self, choice: Choice) -> State:
        """Give the file that a choice leaves."""
        ids = self.durable.copy()
        ids[self.not_durable] = self._versions[self._rows, choice.versions]
        return State(ids[: -(-choice.length // SECTOR)], choice.length)

    def choices(self, random_: random.Random) -> Iterator[Choice]:
        """List what can be left: all of it if that is little, else first the telling ones.

        Without end in the latter case; the same ones in the same order for the same
        ``random_``.
        """
        if self.states <= MAX_EXHAUSTIVE_STATES:
            ranges = [range(count) for count in self._counts.tolist()]
            for versions in itertools.product(*ranges):
                for length in self._lengths:
                    yield Choice(np.array(versions, np.intp), length)
            return
        yield from self._telling()
        rng = np.random.default_rng(random_.getrandbits(64))
        while True:
            yield self._some_steps(rng)
            yield self._some_sectors(rng)

    def _telling(self) -> Iterator[Choice]:
        """Leave out, or keep, one step alone, the first ones, or the last ones."""
        steps = len(self._steps)
        every = range(steps)
        for length in self._lengths:
            for at in every:
                yield self._of_steps(every[at:], length)
                yield self._of_steps([at], length)
                yield self._of_steps([*every[:at], *every[at + 1 :]], length)
                yield self._of_steps(every[:at], length)

    def _of_steps(self, kept: Sequence[int], length: int) -> Choice:
        """Keep some steps, whole, in their order."""
        versions = np.zeros(len(self._counts), np.intp)
        for at in kept:
            places, made = self._made[at]
            versions[places] = made
        return Choice(versions, length)

    def _some_steps(self, rng: np.random.Generator) -> Choice:
        """Keep some steps, whole, in any order."""
        keep = rng.choice((0.2, 0.5, 0.8))
        kept = np.flatnonzero(rng.random(len(self._steps)) < keep)
        if rng.random() < 0.5:
            rng.shuffle(kept)
        return self._of_steps(kept.tolist(), self._a_length(rng))

    def _some_sectors(self, rng: np.random.Generator) -> Choice:
        """Choose for each sector."""
        keep = rng.choice((0.05, 0.3, 0.7, 0.95))
        versions = (rng.random(len(self._counts)) * self._counts).astype(np.intp)
        # The extremes, which are nothing at all and the latest, are chosen more often.
        extreme = np.where(rng.random(len(versions)) < keep, self._counts - 1, 0)
        return Choice(
            np.where(rng.random(len(versions)) < 0.8, extreme, versions), self._a_length(rng)
        )

    def _a_length(self, rng: np.random.Generator) -> int:
        """Choose a length; the latest is the likeliest."""
        if rng.random() < 0.5:
            return self._lengths[0]
        return self._lengths[int(rng.integers(len(self._lengths)))]
