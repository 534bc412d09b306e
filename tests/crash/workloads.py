"""Runs the cases of `tests.crash.cases` on a recording file; the same seed gives the same run."""

from __future__ import annotations

import itertools
import math
import random
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

import numpy as np
import trio
from trio.testing import MockClock

from qedfuse.disk.datapath import discard
from qedfuse.disk.maintenance import datacompaction
from qedfuse.disk.space import quarantine, reclaim
from qedfuse.disk.space.scan import Scan
from qedfuse.errors import QedError
from qedfuse.util import pace
from tests.crash.cases import CLUSTER, PER_CLUSTER, Case
from tests.support.crashrecording import CrashRecording
from tests.support.disks import build_image, l2_entry_offset, opened, put_entry
from tests.support.history import History, base_stamps, disk_stamps, stamped
from tests.support.hostfiles import SECTOR, RecordingFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.hostfile import HostFile
    from tests.support.history import Stamps

_OWN_LEVEL: Final = 100
"""The base number in the stamps of clusters that the image has at the beginning."""
_LEAKED_LEVEL: Final = 101
"""The base number in the stamps of its leaked clusters."""

_FIRST_NUMBER_AFTER_CRASH: Final = 1000
"""Writes after a crash are numbered from here on, so that they differ from those before it."""


def make_bases(case: Case) -> tuple[list[bytearray], Stamps]:
    """Return the backing files, the nearest first, and the stamps of the disk that they make.

    Each of them has some clusters of its own.
    """
    if not case.backing_depth:
        return [], np.zeros(0, np.uint64)
    numbers = base_stamps(1, 0, case.base_sectors)
    bases = [bytearray(stamped(numbers))]
    for level in range(2, case.backing_depth + 1):
        own = {
            number: stamped(base_stamps(level, number * PER_CLUSTER, PER_CLUSTER))
            for number in range(level, 80, 7)
        }
        above = build_image(case.base_sectors * SECTOR, own, backing=b"below")
        numbers = disk_stamps(above, numbers)
        bases.insert(0, above)
    return bases, numbers


def make_image(case: Case) -> bytearray:
    """Return the image at the beginning, with allocated and leaked clusters at random offsets."""
    chosen = random.Random(case.name)
    clusters = chosen.sample(
        range(case.allocated_within or case.size // CLUSTER), case.allocated + case.leaked
    )
    leaked = set(clusters[case.allocated :])
    chosen.shuffle(clusters)
    own = {
        number: stamped(
            base_stamps(
                _LEAKED_LEVEL if number in leaked else _OWN_LEVEL,
                number * PER_CLUSTER,
                PER_CLUSTER,
            )
        )
        for number in clusters
    }
    image = build_image(
        case.size,
        own,
        table_size=case.table_size,
        autoclear=case.autoclear,
        backing=b"base" if case.backing_depth else b"",
    )
    for number in leaked:
        put_entry(image, l2_entry_offset(image, number), 0)
    return image + case.tail


def image_after_power_failure(case: Case, seed: int) -> bytes:
    """Return what a power failure leaves in the second half of a case, one of 200 states."""
    workload = run_case(replace(case, starts_crashed=False), seed)
    chance = random.Random(f"crash {seed}")
    recording = CrashRecording(workload.file)
    count = chance.randrange(len(recording.steps) // 2, len(recording.steps))
    point = next(point for point in recording.crash_points() if point.count == count)
    failure = point.power_failure()
    choices = list(itertools.islice(failure.choices(chance), 200))
    return recording.contents.content(failure.state(chance.choice(choices)))


@contextmanager
def late_scan(seconds: float) -> Iterator[None]:
    """Delay the first table read of all scans that start in the block."""
    walk = Scan._walk

    async def late(self: Scan) -> None:
        await trio.sleep(seconds)
        await walk(self)

    with patch.object(Scan, "_walk", late):
        yield


class Workload:
    """One run of a case.

    Attributes:
        file: The image; records its changes.
        host: The file that the disk uses, which passes its calls on to ``file``.
        history: The requests.
        errors: The errors of requests and closes, if they may fail.
        clean: Whether every close succeeded.
    """

    def __init__(
        self,
        case: Case,
        seed: int,
        *,
        wrap: Callable[[RecordingFile], HostFile] = lambda file: file,
        may_fail: bool = False,
    ) -> None:
        """Prepare a run; everything random depends on the name of the case and on ``seed``.

        ``wrap`` makes the file that the disk uses.  Unless requests ``may_fail``, an error of
        one is raised by `play`.
        """
        self.case = case
        self.bases, below = make_bases(case)
        self.random = random.Random(f"{case.name} {seed}")
        pace = random.Random(f"{case.name} {seed} pace") if case.linger_probability else None
        image = image_after_power_failure(case, seed) if case.starts_crashed else make_image(case)
        self.file = RecordingFile(image, pace=pace, linger_probability=case.linger_probability)
        # With an odd seed the fast path takes the writes that it can.
        self.file.in_page_cache = bool(seed % 2)
        self.host = wrap(self.file)
        self._may_fail = may_fail
        self.errors: list[QedError] = []
        self.clean = True
        numbered_from = _FIRST_NUMBER_AFTER_CRASH if case.starts_crashed else 0
        self.history = History(self.file, below, numbered_from)
        # Few clusters, so that requests overlap.  The first ones are at the border of two tables
        # and at the end of the disk.
        span = case.table_size * CLUSTER // 8 * CLUSTER
        ends = [min(span, case.size) // CLUSTER - 2, case.size // CLUSTER - 4]
        within = case.allocated_within
        near = [self.random.randrange(within) for _ in range(within // 20)]
        others = [self.random.randrange(case.size // CLUSTER) for _ in range(case.hot_spots)]
        self.hot_spots = (ends + near + others)[: case.hot_spots + len(near)]

    def play(self, seed: int) -> None:
        """Run the case to its end; ``seed`` decides the order in which trio runs its tasks."""
        # In half of the runs even few clusters are freed in the way meant for many.
        together = random.Random(f"{self.case.name} {seed} together").random() < 0.5
        few, scattered = (
            (0, 3)
            if together
            else (discard._MAX_CLUSTERS_ONE_BY_ONE, quarantine._MAX_SCATTERED_CLUSTERS)
        )
        # In the other half compaction makes many small batches.
        batch = datacompaction._LIMITED_BATCH_BYTES if together else 3 * CLUSTER
        # Without deterministic scheduling, the order also depends on addresses of objects; and with
        # a limit of real time for work without a checkpoint, on how busy the machine is.
        with (
            patch.object(discard, "_MAX_CLUSTERS_ONE_BY_ONE", new=few),
            patch.object(reclaim, "_MAX_RUNS_RETIRED_SINGLY", new=few),
            patch.object(quarantine, "_MAX_SCATTERED_CLUSTERS", new=scattered),
            patch.object(datacompaction, "_LIMITED_BATCH_BYTES", new=batch),
            patch.object(pace, "_MAX_SECONDS", new=math.inf),
            patch.object(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True),
        ):
            trio._core._run._r.seed(seed)
            trio.run(self.run, clock=MockClock(autojump_threshold=0))

    async def run(self) -> None:
        """Run the sessions of the case one after the other."""
        for number in range(self.case.sessions):
            self.file.reopen()
            try:
                with late_scan(self.case.scan_delay_seconds):
                    await self._use(grows=bool(self.case.grow_bytes) and not number)
            except QedError as error:
                self._failed(error)
                self.clean = False
            else:
                self.history.closed()

    async def _use(self, *, grows: bool) -> None:
        """Open the disk, use it by several tasks, and close it."""
        async with opened(self.host, self.bases, self.case.options) as disk:
            self.history.attach(disk)
            async with trio.open_nursery() as nursery:
                for _ in range(self.case.tasks):
                    nursery.start_soon(self._task)
                if grows:
                    await trio.sleep(2)
                    await self._attempt(self.history.resize, self.case.size + self.case.grow_bytes)
            if self.case.compacts:
                await self._attempt(disk.compact)
            await self.before_close(disk)

    async def before_close(self, disk: Disk) -> None:
        """Do nothing; a subclass tests here what ``disk`` can still do."""

    async def _task(self) -> None:
        for _ in range(self.case.actions_per_task):
            await self._attempt(self._act, self.random.choice(self.case.actions))

    async def _attempt(self, act: Callable[..., Awaitable[object]], *args: object) -> None:
        """Call a function, and record its error if requests may fail."""
        try:
            await act(*args)
        except QedError as error:
            self._failed(error)

    def _failed(self, error: QedError) -> None:
        if not self._may_fail:
            raise error
        self.errors.append(error)

    async def _act(self, action: str) -> None:
        """Do one action, at a random offset and of a random length."""
        choice, history = self.random, self.history
        sectors = history.disk.size // SECTOR
        if action == "f":
            await history.flush()
            return
        if action == "s":
            await trio.sleep(choice.choice((0.1, 1.0, 3.0, 5.0)))
            return
        cluster = choice.choice(self.hot_spots) + choice.randrange(-3, 3)
        first = cluster * PER_CLUSTER + choice.choice((0, 0, 0, 1, 3, 7))
        first = max(0, min(first, sectors - 1))
        count = min(choice.choice((1, 3, 8, 8, 16, 24)), sectors - first)
        if action == "D":
            within = self.case.allocated_within or sectors // PER_CLUSTER
            await history.discard(choice.randrange(within // 2) * PER_CLUSTER, sectors // 32)
            return
        act = {"w": history.write, "d": history.discard, "z": history.write_zeros}
        await act.get(action, history.read)(first, count)


def run_case(case: Case, seed: int, *, may_fail: bool = False) -> Workload:
    """Run a case and return the finished workload; ``seed`` decides everything random."""
    workload = Workload(case, seed, may_fail=may_fail)
    workload.play(seed)
    return workload
