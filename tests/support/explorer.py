"""Looks at the states that a crash can leave of a recorded workload, and judges each of them.

It covers every prefix of the changes, which is what a killed process leaves.  Just before each
datasync ends, when the most changes are not durable, it also covers what a power failure can
leave; where there are too many such states, it draws some, the same ones for the same seed.

`tests.support.crashoracle` judges every state.  At fixed intervals a state is also handed to
the project's own check, opened, repaired and written to, and shown to ``qemu-img check``.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.check.checker import check_image
from qedfuse.check.repair import repair_image
from qedfuse.hostio.imagefile import read_header
from tests.support import qemu
from tests.support.crashoracle import CrashOracle
from tests.support.crashrecording import CrashRecording
from tests.support.disks import WRITABLE, opened
from tests.support.history import disk_stamps, stamped, stamps, write_stamps
from tests.support.hostfiles import SECTOR, MemoryFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from qedfuse.disk.disk import Disk
    from tests.support.crashrecording import CrashPoint, PowerFailure, State
    from tests.support.history import History, Stamps

CHECK_EVERY_STATES: Final = 101
"""Of this many states one is handed to the project's check."""
OPEN_EVERY_STATES: Final = 499
"""Of this many states one is opened, repaired and written to."""
QEMU_EVERY_STATES: Final = 701
"""Of this many states one is shown to QEMU's check."""


class StateId(NamedTuple):
    """The key by which ``python -m tests.crash.explore`` rebuilds a state.

    Attributes:
        workload: The name of the case.
        seed: The seed of the workload.
        prefix: How many changes there were before the crash.
        choice: The index of the choice at that crash point; None for the prefix itself.
    """

    workload: str
    seed: int
    prefix: int
    choice: int | None

    def __str__(self) -> str:
        """Return the command-line options that show this state again."""
        again = f"--workload '{self.workload}' --seed {self.seed} --prefix {self.prefix}"
        return again if self.choice is None else f"{again} --choice {self.choice}"


@dataclass
class Exploration:
    """How many states were looked at, and what was wrong with them.

    Attributes:
        counts: The number of ``states`` judged, of ``prefixes``, of ``points`` at which power
            failures were explored, of points that were ``exhausted``, and of states that were
            also ``checked``, ``opened`` and shown to ``qemu``.
        violations: The first violation of each kind, with the state that shows it.
        violated: How many states violate a promise.
        misread: What reads returned and must not, while the disk was in use.
    """

    counts: Counter[str] = field(default_factory=Counter)
    violations: dict[str, tuple[StateId, str]] = field(default_factory=dict)
    violated: int = 0
    misread: list[str] = field(default_factory=list)

    @property
    def states(self) -> int:
        """How many different states were judged."""
        return self.counts["states"]

    def note(self, state_id: StateId, problems: list[str]) -> None:
        """Record the problems of one state; an empty list records nothing."""
        if problems:
            self.violated += 1
        for problem in problems:
            # Violations that differ in numbers only are of one kind.
            self.violations.setdefault(re.sub(r"[0-9, ]+", " ", problem), (state_id, problem))

    def add(self, other: Exploration) -> None:
        """Add the results of another exploration."""
        self.counts += other.counts
        self.violated += other.violated
        self.misread += other.misread
        self.violations = other.violations | self.violations

    def __str__(self) -> str:
        """Return the counts in one line."""
        names = ("states", "prefixes", "points", "exhausted", "checked", "opened", "qemu")
        return ", ".join(f"{self.counts[name]} {name}" for name in names)

    def report(self) -> str:
        """Return a line for each kind of violation, with the command that shows it again."""
        lines = [
            f"{problem}\n    python -m tests.crash.explore {state_id}"
            for state_id, problem in self.violations.values()
        ]
        return "\n".join([f"{self.violated} bad states", *lines])


class Explorer:
    """Explores the crash states of one recorded workload.

    Attributes:
        found: The results.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        history: History,
        bases: Sequence[bytes | bytearray] = (),
        *,
        scratch: Path | None = None,
    ) -> None:
        """Explore what ``history`` has recorded of an image over ``bases``.

        QEMU is shown images in the directory ``scratch``; without one it is not asked.
        """
        self._name = name
        self._seed = seed
        self._history = history
        self._bases = bases
        self._scratch = scratch
        self._recording = CrashRecording(history.file)
        self._oracle = CrashOracle(history, self._recording.contents, self._recording.initial.ids)
        self._seen: set[int] = set()
        self.found = Exploration()

    def crash_points(self) -> Iterator[CrashPoint]:
        """Yield the crash points of the recording, each valid until the next one."""
        return self._recording.crash_points()

    def random(self, count: int) -> random.Random:
        """Return the random generator for the crash point after ``count`` changes."""
        return random.Random(f"{self._name} {self._seed} {count}")

    async def explore(self, states: int) -> Exploration:
        """Judge all prefixes and about ``states`` states of power failures; return the results."""
        steps = self._recording.steps
        # Just before a datasync ends, the most changes are not durable.  Changes that were made
        # during it are not durable after it either, so that point counts as well.
        points = [n for n, step in enumerate(steps) if step.durable is not None]
        points += [n + 1 for n in points if steps[n].durable != n] + [len(steps)]
        wanted = set(points)
        states_left, points_left = states, len(wanted)
        for point in self._recording.crash_points():
            self.found.counts["prefixes"] += 1
            state_id = StateId(self._name, self._seed, point.count, None)
            await self._look(state_id, point.prefix())
            if point.count in wanted:
                before = self.found.states
                await self._explore_point(point, states_left // points_left)
                states_left -= self.found.states - before
                points_left -= 1
        return self.found

    async def _explore_point(self, point: CrashPoint, max_states: int) -> None:
        """Judge the states of a power failure at one point, up to ``max_states`` of them."""
        failure = point.power_failure()
        self.found.counts["points"] += 1
        choices = failure.choices(self.random(point.count))
        before = self.found.states
        # Different choices may give a state that was seen before; draw more, up to a limit.
        for number, choice in enumerate(itertools.islice(choices, 2 * max_states + 1)):
            if self.found.states - before >= max_states:
                return
            state_id = StateId(self._name, self._seed, point.count, number)
            await self._look(state_id, failure.state(choice), failure)
        if failure.states <= max_states:
            self.found.counts["exhausted"] += 1

    async def _look(
        self, state_id: StateId, state: State, failure: PowerFailure | None = None
    ) -> None:
        """Judge a state, unless the same state was judged by the same promises."""
        promises = self._oracle.promises(state_id.prefix)
        key = hash((promises, state.length, state.ids.tobytes()))
        if key in self._seen:
            return
        self._seen.add(key)
        self.found.counts["states"] += 1
        problems = await self.judge(state, state_id.prefix, failure, self.found.states)
        self.found.note(state_id, problems)

    async def judge(
        self, state: State, prefix: int, failure: PowerFailure | None = None, number: int = 0
    ) -> list[str]:
        """Return the problems of a state after ``prefix`` changes.

        ``failure`` is the power failure that leaves the state, None if only the process is
        killed.  ``number`` decides which other checks the state is handed to; 0 is handed to all.
        """
        problems = self._oracle.problems(prefix, state, failure)
        if number % CHECK_EVERY_STATES == 0:
            self.found.counts["checked"] += 1
            problems += await self._check(state)
        if number % OPEN_EVERY_STATES == 0 and not problems:
            self.found.counts["opened"] += 1
            problems += await self._use(state)
        # QEMU cannot open images whose tables are one cluster long.
        ask = self._scratch is not None and self._oracle.header(state).table_size > 1
        if ask and number % QEMU_EVERY_STATES == 0:
            self.found.counts["qemu"] += 1
            problems += self._ask_qemu(state)
        return problems

    def content(self, state: State) -> bytes:
        """Return the bytes of a state."""
        return self._recording.contents.content(state)

    async def _check(self, state: State) -> list[str]:
        """Return where the project's check and the oracle disagree about the tables."""
        file = MemoryFile(self.content(state), writable=False)
        report = await check_image(file, await read_header(file))
        tables = self._oracle.tables(state)
        if bool(report.errors) != bool(tables.errors):
            return [f"the check finds {report.findings}, the oracle {tables.errors}"]
        # Clusters that the free list names are not leaked.
        leaks = 0 if self._oracle.header(state).has_free_list else tables.leaks
        if not tables.errors and report.leaks != leaks:
            return [f"the check finds {report.leaks} leaks, the oracle {leaks}"]
        return []

    async def _use(self, state: State) -> list[str]:
        """Open a state, repair it and write to it; return what else changed, or is damaged."""
        image = self.content(state)
        expected = disk_stamps(image, self._history.below)
        async with opened(MemoryFile(image, writable=False), self._bases) as disk:
            got = stamps(await disk.read(0, disk.size))
        if (got != expected).any():
            return ["a disk opened on it shows something else"]
        file = MemoryFile(bytes(image))
        repaired = await repair_image(file, await read_header(file))
        if repaired.after.errors or repaired.lost or repaired.copied or repaired.cleared:
            return [f"a repair found something to do: {repaired}"]
        async with opened(file, self._bases, WRITABLE) as disk:
            await self._write_to_four_ranges(disk, expected)
            got = stamps(await disk.read(0, disk.size))
        problems = []
        file.reopen()
        if (got != expected).any() or (disk_stamps(file.content, self._history.below) != got).any():
            problems.append("a disk that is used after the crash loses something")
        report = await check_image(file, header := await read_header(file))
        if report.errors or header.need_check:
            problems.append(f"a disk that is used after the crash is damaged: {report.findings}")
        return problems

    @staticmethod
    async def _write_to_four_ranges(disk: Disk, expected: Stamps) -> None:
        """Write to four ranges between the ends of a disk, and update ``expected``."""
        size = len(expected)
        for number, first in enumerate((3, size // 3, size // 2, size - 9), 1):
            new = write_stamps((1 << 30) + number, first, 9)
            await disk.write(first * SECTOR, stamped(new))
            expected[first : first + 9] = new

    def _ask_qemu(self, state: State) -> list[str]:
        """Return where QEMU's check and the oracle disagree about the tables.

        QEMU must refuse an image with a free list, whose feature bit it does not know.
        """
        assert self._scratch is not None
        path = self._scratch / "state.qed"
        if self._oracle.header(state).has_backing:
            # QEMU opens the base, and does not read it.
            (self._scratch / "base").write_bytes(bytes(SECTOR))
        path.write_bytes(self.content(state))
        if self._oracle.header(state).has_free_list:
            try:
                qemu.check(path)
            except qemu.QemuError:
                return []
            return ["qemu-img check opens an image with a free list"]
        result = qemu.check(path)
        expected = bool(self._oracle.tables(state).errors)
        if (result.errors > 0) != expected:
            return [f"qemu-img check: {result.text}"]
        return []
