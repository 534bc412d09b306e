"""Looks at the states that a crash can leave of a recorded workload, and judges each.

Every prefix of the changes, which is what a killed process leaves; and for each moment
before a datasync ends, when the most is at stake, what a power failure can leave.
Where there are too many states, some are chosen, the same ones for the same seed.

Every state is judged by `tests.support.crashoracle`.  A sample is also handed to the check of
the project, opened, repaired, written to, and shown to ``qemu-img check``.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.check.repair import repair_image
from qedfuse.check.walk import check_image
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
    from tests.support.crashrecording import CrashPoint, State
    from tests.support.history import History, Stamps

CHECK_EVERY_STATES: Final = 101
OPEN_EVERY_STATES: Final = 499
QEMU_EVERY_STATES: Final = 1499
"""One state in so many is handed to our check, opened and used, shown to QEMU's check."""


class StateId(NamedTuple):
    """Where to find a state again.

    ``choice`` counts the choices at the moment after ``prefix`` changes; None is the
    prefix itself.
    """

    workload: str
    seed: int
    prefix: int
    choice: int | None

    def __str__(self) -> str:
        """Give the options that show this state again."""
        again = f"--workload '{self.workload}' --seed {self.seed} --prefix {self.prefix}"
        return again if self.choice is None else f"{again} --choice {self.choice}"


@dataclass
class Exploration:
    """What was looked at, and what was found.

    Attributes:
        counts: How many states were judged, and how many of them by whom else.
        violations: The first violation of each kind, with where it is.
        violated: How many states were found bad.
        misread: What reads showed that they must not, while the disk was in use.
    """

    counts: Counter[str] = field(default_factory=Counter)
    violations: dict[str, tuple[StateId, str]] = field(default_factory=dict)
    violated: int = 0
    misread: list[str] = field(default_factory=list)

    @property
    def states(self) -> int:
        """How many different states were judged."""
        return self.counts["states"]

    def note(self, place: StateId, problems: list[str]) -> None:
        """Note what was found at one state."""
        if problems:
            self.violated += 1
        for problem in problems:
            # Violations that differ in numbers only are of one kind.
            self.violations.setdefault(re.sub(r"[0-9, ]+", " ", problem), (place, problem))

    def add(self, other: Exploration) -> None:
        """Take in what another exploration has found."""
        self.counts += other.counts
        self.violated += other.violated
        self.misread += other.misread
        self.violations = other.violations | self.violations

    def __str__(self) -> str:
        """Sum up in one line."""
        names = ("states", "prefixes", "moments", "exhausted", "checked", "opened", "qemu")
        return ", ".join(f"{self.counts[name]} {name}" for name in names)

    def report(self) -> str:
        """Describe the violations, each with how to see it again."""
        lines = [
            f"{problem}\n    python -m tests.crash.explore {place}"
            for place, problem in self.violations.values()
        ]
        return "\n".join([f"{self.violated} bad states", *lines])


class Explorer:
    """Explores one recorded workload."""

    def __init__(
        self,
        name: str,
        seed: int,
        history: History,
        bases: Sequence[bytes | bytearray] = (),
        *,
        scratch: Path | None = None,
    ) -> None:
        """Explore what ``history`` recorded; show samples to QEMU in the directory ``scratch``."""
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
        """Show each moment of the recording."""
        return self._recording.crash_points()

    def random(self, count: int) -> random.Random:
        """Give the source of chance for the moment after ``count`` changes."""
        return random.Random(f"{self._name} {self._seed} {count}")

    async def explore(self, states: int) -> Exploration:
        """Look at all prefixes and at about ``states`` states more."""
        steps = self._recording.steps
        # Right before a datasync ends the most is at stake; what is not durable after it
        # was changed while it was under way.
        last = [n for n, step in enumerate(steps) if step.durable is not None]
        last += [n + 1 for n in last if steps[n].durable != n] + [len(steps)]
        wanted = set(last)
        left = states
        ahead = len(wanted)
        for point in self._recording.crash_points():
            prefix = point.prefix()
            self.found.counts["prefixes"] += 1
            await self._look(StateId(self._name, self._seed, point.count, None), prefix, point)
            if point.count in wanted:
                before = self.found.states
                await self._explore_point(point, left // ahead)
                left -= self.found.states - before
                ahead -= 1
        return self.found

    async def _explore_point(self, point: CrashPoint, most: int) -> None:
        """Look at up to ``most`` states of one moment, or at all of them."""
        point.develop()
        everything = point.states
        self.found.counts["moments"] += 1
        choices = point.choices(self.random(point.count))
        before = self.found.states
        # Some choices turn out to be the same state: more are drawn, but not for ever.
        for number, choice in enumerate(itertools.islice(choices, 2 * most + 1)):
            if self.found.states - before >= most:
                return
            place = StateId(self._name, self._seed, point.count, number)
            await self._look(place, point.state(choice), point)
        if everything <= most:
            self.found.counts["exhausted"] += 1

    async def _look(self, place: StateId, state: State, point: CrashPoint) -> None:
        """Judge a state, unless the same was judged under the same promises."""
        promises = self._history.promises(place.prefix)
        key = hash((promises, state.length, state.ids.tobytes()))
        if key in self._seen:
            return
        self._seen.add(key)
        self.found.counts["states"] += 1
        self.found.note(place, await self.judge(state, point, self.found.states))

    async def judge(self, state: State, point: CrashPoint, number: int = 0) -> list[str]:
        """Judge a state; ``number`` decides who else does."""
        problems = self._oracle.problems(point, state)
        if number % CHECK_EVERY_STATES == 0:
            self.found.counts["checked"] += 1
            problems += await self._confirm(state)
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
        """Give the bytes of a state."""
        return self._recording.contents.content(state)

    async def _confirm(self, state: State) -> list[str]:
        """See whether the project's check agrees with the judge on the tables."""
        file = MemoryFile(self.content(state), writable=False)
        report = await check_image(file, await read_header(file))
        tables = self._oracle.tables(state)
        if bool(report.errors) != bool(tables.errors):
            return [f"the check finds {report.findings}, the judge {tables.errors}"]
        # What a list names is not leaked.
        leaks = 0 if self._oracle.header(state).free_list else tables.leaks
        if not tables.errors and report.leaks != leaks:
            return [f"the check finds {report.leaks} leaks, the judge {leaks}"]
        return []

    async def _use(self, state: State) -> list[str]:
        """Open what a crash left, repair it, write to it, and see that nothing else changes."""
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
            await self._write_here_and_there(disk, expected)
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
    async def _write_here_and_there(disk: Disk, expected: Stamps) -> None:
        """Write to some places of a disk, old ones and new ones."""
        size = len(expected)
        for number, place in enumerate((3, size // 3, size // 2, size - 9), 1):
            new = write_stamps((1 << 30) + number, place, 9)
            await disk.write(place * SECTOR, stamped(new))
            expected[place : place + 9] = new

    def _ask_qemu(self, state: State) -> list[str]:
        """See whether QEMU's check finds nothing worse than leaks."""
        assert self._scratch is not None
        path = self._scratch / "state.qed"
        if self._oracle.header(state).has_backing:
            # It is opened, and not looked at.
            (self._scratch / "base").write_bytes(bytes(SECTOR))
        path.write_bytes(self.content(state))
        if self._oracle.header(state).free_list:
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
