"""All states of a recorded file that a crash or a power failure can leave.

A disk writes sectors, each of them atomically.  Every content that a sector ever had gets a
number, so a state of the file is an array of content numbers and a length.  That makes a state
cheap: a test looks at a hundred thousand of them.

The terms, from the coarse to the fine:

- a *recording* is the list of changes that a `RecordingFile` has kept, as *steps*: which sectors
  each change touched, and their content after it;
- a *crash point* is a moment of the recording, after some number of changes;
- a process that is killed there leaves the *prefix*: all changes up to the point;
- a *power failure* there leaves one of many states.  What was in the file when the last completed
  datasync began is durable.  Of later changes, each sector has any of the versions that it had
  since then, and the length of the file is any of its lengths since then, all independently of
  each other: writes, truncations and punches are lost or kept in any subset and any order.  What
  lies past the length that was kept is lost;
- a *choice* selects one version for each of these sectors, and one length.
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
    """Content numbers, or numbers of sectors."""

WORDS_PER_SECTOR: Final = SECTOR // 8
MIXED: Final = (1 << 64) - 1
"""The stamp of a sector whose words differ from each other."""

MAX_EXHAUSTIVE_STATES: Final = 512
"""Up to this many states of a power failure are all enumerated; if there are more, some are
drawn."""


class State(NamedTuple):
    """A file: the content number of each of its sectors, and its length in bytes."""

    ids: Ids
    length: int


class SectorContents:
    """Numbers for all contents that sectors ever had; number 0 is zeros."""

    def __init__(self) -> None:
        """Start with the content of zeros only."""
        self._ids: dict[bytes, int] = {bytes(SECTOR): 0}
        self._words: NDArray[np.uint64] | None = None
        self._stamps: NDArray[np.uint64] | None = None

    def number(self, data: bytes) -> int:
        """Return the number of a sector's content, a new one for a new content."""
        return self._ids.setdefault(data, len(self._ids))

    @property
    def words(self) -> NDArray[np.uint64]:
        """All contents by their numbers, a row of 64-bit words each."""
        if self._words is None or len(self._words) < len(self._ids):
            self._words = np.frombuffer(b"".join(self._ids), "<u8").reshape(-1, WORDS_PER_SECTOR)
        return self._words

    @property
    def stamps(self) -> NDArray[np.uint64]:
        """For each content the word that it repeats, or `MIXED`."""
        if self._stamps is None or len(self._stamps) < len(self._ids):
            words = self.words
            same = (words == words[:, :1]).all(axis=1)
            self._stamps = np.where(same, words[:, 0], np.uint64(MIXED))
        return self._stamps

    def content(self, state: State) -> bytes:
        """Return the bytes of a file in a state."""
        return self.words[state.ids].tobytes()[: state.length]


@dataclass(frozen=True, slots=True)
class Step:
    """The effect of one change.

    Attributes:
        sectors: The sectors that it touched.
        ids: Their content numbers after it.
        length: The length of the file after it, in bytes.
        durable: For a datasync, how many steps it made durable; None for other changes.
    """

    sectors: Ids
    ids: Ids
    length: int
    durable: int | None = None


_NONE: Final[Ids] = np.empty(0, np.int32)


class CrashRecording:
    """The changes of a `RecordingFile`, split into sectors.

    Attributes:
        contents: The meaning of the content numbers.
        initial: The file before the first change.
        steps: The changes, the oldest first.
    """

    def __init__(self, file: RecordingFile) -> None:
        """Split the changes that ``file`` has recorded until now."""
        self.contents = SectorContents()
        self._bytes = bytearray(file.initial)
        self._length = len(file.initial)
        ends = [len(file.initial)]
        ends += [change.size for change in file.changes if isinstance(change, Truncate)]
        ends += [c.offset + len(c.data) for c in file.changes if isinstance(c, Write)]
        sectors = -(-max(ends) // SECTOR)
        self._bytes.extend(bytes(sectors * SECTOR - len(self._bytes)))
        self.initial = State(np.array(self._numbers(0, sectors), np.int32), self._length)
        self.steps = [self._apply(at, change) for at, change in enumerate(file.changes)]

    def _numbers(self, first: int, last: int) -> list[int]:
        """Return the content numbers of the sectors from ``first`` up to ``last``."""
        return [
            self.contents.number(bytes(self._bytes[n * SECTOR : (n + 1) * SECTOR]))
            for n in range(first, last)
        ]

    def _apply(self, at: int, change: Change) -> Step:
        """Apply one change, the one with the index ``at``, and return its effect."""
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
        ids = np.array(self._numbers(first, last), np.int32)
        return Step(np.arange(first, last, dtype=np.int32), ids, self._length)

    def crash_points(self) -> Iterator[CrashPoint]:
        """Yield the crash point after each number of changes, 0 included.

        A crash point is valid until the next one is asked for.
        """
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
            yield CrashPoint(count, durable, now, lengths[done : count + 1], self.steps[done:count])


@dataclass(frozen=True)
class CrashPoint:
    """The file after ``count`` changes, of which the last ones are not durable.

    Attributes:
        count: How many changes there were.
        durable: The durable content number of each sector.
        now: The content number of each sector after the last change.
        lengths: The durable length, and all lengths since then.
        steps: The changes that are not durable.
    """

    count: int
    durable: Ids
    now: Ids
    lengths: Sequence[int]
    steps: Sequence[Step]

    def prefix(self) -> State:
        """Return the file that a killed process leaves."""
        length = self.lengths[-1]
        return State(self.now[: -(-length // SECTOR)].copy(), length)

    def power_failure(self) -> PowerFailure:
        """Return the states that a power failure leaves."""
        return PowerFailure(self)


class Choice(NamedTuple):
    """One version for each sector that is not durable, and the length of the file in bytes."""

    versions: NDArray[np.intp]
    length: int


class PowerFailure:
    """The states that a power failure at one crash point can leave.

    Attributes:
        durable: The durable content number of each sector.
        not_durable: The sectors that were changed since then.
        states: How many combinations of versions and lengths there are; some may be equal.
    """

    def __init__(self, point: CrashPoint) -> None:
        """List the versions of each sector that is not durable."""
        self.durable = point.durable
        # The latest first: it is drawn most often.
        self._lengths = list(dict.fromkeys(reversed(point.lengths)))
        versions_of: dict[int, list[int]] = {}
        row_of: dict[int, int] = {}
        # The rows of the sectors of each step, and which version of each sector the step made.
        self._made: list[tuple[list[int], list[int]]] = []
        for step in point.steps:
            rows, made = [], []
            for sector, content in zip(step.sectors.tolist(), step.ids.tolist(), strict=True):
                versions = versions_of.get(sector)
                if versions is None:
                    versions = versions_of[sector] = [int(self.durable[sector])]
                    row_of[sector] = len(row_of)
                if versions[-1] != content:
                    versions.append(content)
                rows.append(row_of[sector])
                made.append(len(versions) - 1)
            self._made.append((rows, made))
        counts = [len(versions) for versions in versions_of.values()]
        self._counts = np.array(counts, np.intp)
        self.not_durable: Ids = np.array(list(versions_of), np.int32)
        self._versions = np.zeros((len(counts), max(counts, default=1)), np.int32)
        for row, versions in enumerate(versions_of.values()):
            self._versions[row, : len(versions)] = versions
        self._rows = np.arange(len(counts))
        self.states = math.prod(counts) * len(self._lengths)

    def state(self, choice: Choice) -> State:
        """Return the file that a choice leaves."""
        ids = self.durable.copy()
        ids[self.not_durable] = self._versions[self._rows, choice.versions]
        return State(ids[: -(-choice.length // SECTOR)], choice.length)

    def choices(self, random_: random.Random) -> Iterator[Choice]:
        """Yield choices, the same ones in the same order for the same ``random_``.

        All choices if there are up to `MAX_EXHAUSTIVE_STATES`.  Otherwise without end: first
        those that lose or keep single steps, then random ones, with repetitions.
        """
        if self.states <= MAX_EXHAUSTIVE_STATES:
            ranges = [range(count) for count in self._counts.tolist()]
            for versions in itertools.product(*ranges):
                for length in self._lengths:
                    yield Choice(np.array(versions, np.intp), length)
            return
        yield from self._around_each_step()
        rng = np.random.default_rng(random_.getrandbits(64))
        while True:
            yield self._random_steps(rng)
            yield self._random_sectors(rng)

    def _around_each_step(self) -> Iterator[Choice]:
        """Yield four choices for each step of the recording.

        They keep all steps from this one on, this step alone, all others, or all earlier ones.
        """
        every = range(len(self._made))
        for length in self._lengths:
            for at in every:
                yield self._of_steps(every[at:], length)
                yield self._of_steps([at], length)
                yield self._of_steps([*every[:at], *every[at + 1 :]], length)
                yield self._of_steps(every[:at], length)

    def _of_steps(self, kept: Sequence[int], length: int) -> Choice:
        """Return the choice that keeps whole steps, applied in the order of ``kept``."""
        versions = np.zeros(len(self._counts), np.intp)
        for at in kept:
            rows, made = self._made[at]
            versions[rows] = made
        return Choice(versions, length)

    def _random_steps(self, rng: np.random.Generator) -> Choice:
        """Return a choice that keeps a random subset of the steps, half of the time shuffled."""
        keep = rng.choice((0.2, 0.5, 0.8))
        kept = np.flatnonzero(rng.random(len(self._made)) < keep)
        if rng.random() < 0.5:
            rng.shuffle(kept)
        return self._of_steps(kept.tolist(), self._random_length(rng))

    def _random_sectors(self, rng: np.random.Generator) -> Choice:
        """Return a choice that draws a version for each sector.

        The oldest and the latest version are drawn more often than those between them.
        """
        keep = rng.choice((0.05, 0.3, 0.7, 0.95))
        versions = (rng.random(len(self._counts)) * self._counts).astype(np.intp)
        extreme = np.where(rng.random(len(versions)) < keep, self._counts - 1, 0)
        return Choice(
            np.where(rng.random(len(versions)) < 0.8, extreme, versions), self._random_length(rng)
        )

    def _random_length(self, rng: np.random.Generator) -> int:
        """Return the latest length in half of the cases, otherwise any of them."""
        if rng.random() < 0.5:
            return self._lengths[0]
        return self._lengths[int(rng.integers(len(self._lengths)))]
