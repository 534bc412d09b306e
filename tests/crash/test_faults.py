"""A host call fails once, or the host is full for a while, at any step of a workload (D7, S5)."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.errors import HostError, NoSpaceError, ReadOnlyError
from tests.crash.cases import Case
from tests.crash.workloads import Workload
from tests.support.disks import UNCOMPACTED, WRITABLE, header_of, inspect_image
from tests.support.explorer import Explorer
from tests.support.hostfiles import SECTOR, FailingFile, RecordingFile
from tests.support.share import ALL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import Action, _Fault

STATES: Final = 120
"""How many states of power failures are judged after each fault, beside all prefixes."""

ALONE: Final = Case(
    "alone",
    table_spans=0.4,
    backing_depth=1,
    base_sectors=1600,
    grow_bytes=2 << 20,
    tasks=1,
    actions="wwwddzfrs",
    actions_per_task=24,
    allocated=12,
    hot_spots=4,
    options=WRITABLE,
)
"""One task, and nothing in the background, so that a failed call fails the request itself."""

PLAIN: Final = replace(ALONE, name="plain", options=UNCOMPACTED)
"""The same without compaction at the close, whose failures are only logged."""

TOGETHER: Final = replace(
    ALONE, name="together", backing_depth=0, grow_bytes=0, tasks=3, actions_per_task=14
)
LISTED: Final = replace(
    ALONE,
    name="listed",
    leaked=30,
    backing_depth=0,
    grow_bytes=0,
    options=replace(WRITABLE, free_list="on"),
)
BACKGROUND: Final = replace(
    TOGETHER,
    name="background",
    options=replace(WRITABLE, commit_seconds=0.4, needcheck_seconds=0.5),
)

MAX_REPORTS: Final = {"alone": 2, "together": 3, "background": 3, "listed": 2}
"""How many requests of a case may fail by one failed call.

One task: the request, and the close or the flush after it.  Three tasks: all that wait for the
same write-back cycle.
"""

SEED: Final = 5
"""The seed of all runs; with the same seed, every run makes the same calls up to the fault."""

pytestmark = pytest.mark.usefixtures("no_log")


class Host(FailingFile):
    """A failing host file that records its first failure.

    Attributes:
        first_struck: The call that failed first; None before that.
        bit_was_set: Whether the file had NEED_CHECK set then.
    """

    def __init__(self, inner: RecordingFile) -> None:
        """Wrap a recording file."""
        super().__init__(inner)
        self.recording = inner
        self.first_struck: Action | None = None
        self.bit_was_set = False

    def _raise(self, fault: _Fault, action: Action) -> None:
        if self.first_struck is None:
            self.first_struck = action
            self.bit_was_set = header_of(self.recording.content).need_check
        super()._raise(fault, action)


class FailingWorkload(Workload):
    """A run of a case on a host that fails; the test puts faults into ``host``."""

    host: Host

    def __init__(self, case: Case) -> None:
        """Prepare a run."""
        super().__init__(case, SEED, wrap=Host, may_fail=True)

    async def before_close(self, disk: Disk) -> None:
        """Assert that the disk is usable after the failure, or read-only with a reason."""
        if self.host.first_struck is None:
            return
        self.host.heal()
        await disk.read(0, disk.size)
        if self.host.first_struck != "datasync":
            assert disk.writable
            for first in (3, disk.size // SECTOR - 9):
                await self.history.write(first, 9)
                await self.history.discard(first + 2, 1)
            await self.history.flush()
            await self.history.read(0, disk.size // SECTOR)
            await disk.ensure_scanned()
            now = disk.statistics()
            if now.free_clusters is not None:
                found = inspect_image(self.file.content[: now.file_bytes])
                assert found.leaks == now.free_clusters + now.quarantined_clusters
            return
        assert not disk.writable
        assert disk.failure
        with pytest.raises(ReadOnlyError):
            await disk.write(0, b"x")
        with pytest.raises(ReadOnlyError):
            await disk.discard(0, SECTOR)
        with pytest.raises(HostError):
            await disk.flush()

    def judge(self) -> None:
        """Assert that every crash state of the run, and its final state, are sound."""
        assert self.history.misread == []
        explorer = Explorer(self.case.name, 0, self.history, self.bases)
        found = trio.run(explorer.explore, STATES)
        assert not found.violations, found.report()
        bit = header_of(self.file.content).need_check
        if self.host.first_struck == "datasync":
            # The close reports it as well, and does not clear the bit.
            assert isinstance(self.errors[-1], HostError)
            assert bit >= self.host.bit_was_set
        elif self.host.first_struck:
            assert bit <= (not self.clean), "a disk that can be used is closed cleanly"


def calls(case: Case, action: Action) -> int:
    """Return how many calls of a kind a case makes without a fault."""
    workload = FailingWorkload(case)
    workload.play(SEED)
    assert workload.errors == []
    return workload.host.calls[action]


def faults(
    case: Case,
    action: Action,
    number: int,
    *,
    short: int = 0,
    lasting: bool = False,
    only: slice = slice(None),
) -> Iterator[FailingWorkload]:
    """Run a case once for each call of a kind, let that call fail, and judge and yield the run.

    ``only`` selects some of the calls.
    """
    count = calls(case, action)
    assert count, f"{case.name} makes no call of {action}"
    for nth in range(1, count + 1)[only]:
        workload = FailingWorkload(case)
        workload.host.fail(action, nth, number, short=short, lasting=lasting)
        workload.play(SEED)
        assert workload.host.first_struck == action, nth
        workload.judge()
        yield workload


LENGTHS: Final = (0, 512, 1536)
"""After how many bytes a write may fail."""
NUMBERS: Final = (errno.EIO, errno.ENOSPC)


@pytest.mark.parametrize("short", LENGTHS)
@pytest.mark.parametrize("number", NUMBERS)
def test_failed_write_is_reported_once(number: int, short: int) -> None:
    """A failed host write fails one request with the host's error, and the disk stays usable."""
    # The share: with each error each write fails once, after one of the lengths, in turn.
    first = (LENGTHS.index(short) + NUMBERS.index(number)) % len(LENGTHS)
    only = slice(None) if ALL else slice(first, None, len(LENGTHS))
    runs = 0
    for workload in faults(PLAIN, "write", number, short=short, only=only):
        runs += 1
        (error,) = workload.errors
        assert isinstance(error, HostError)
        assert error.errno == number
        assert isinstance(error, NoSpaceError) == (number == errno.ENOSPC)
    assert runs > 3


@pytest.mark.parametrize(
    "case",
    [ALONE, TOGETHER, BACKGROUND],
    ids=lambda case: case.name,
)
def test_failed_datasync_makes_the_disk_read_only(case: Case) -> None:
    """After a failed datasync the disk is read-only, has a reason, and keeps NEED_CHECK."""
    for workload in faults(case, "datasync", errno.EIO):
        assert workload.errors


@pytest.mark.parametrize(
    "action",
    [
        "reserve",
        "truncate",
        "punch",
        "read",
    ],
)
def test_failure_of_other_calls(action: Action) -> None:
    """A failed reservation, truncation, punch or read is reported, or costs only space."""
    for workload in faults(ALONE, action, errno.EIO):
        assert all(isinstance(error, HostError) for error in workload.errors)
        assert len(workload.errors) <= MAX_REPORTS[ALONE.name]


@pytest.mark.parametrize("action", ["write", "reserve", "truncate"])
def test_failure_beside_other_requests(action: Action) -> None:
    """A failed call does no harm to requests that run concurrently."""
    for workload in faults(TOGETHER, action, errno.EIO):
        assert len(workload.errors) <= MAX_REPORTS[TOGETHER.name]


@pytest.mark.parametrize(
    "action",
    [
        "write",
        "truncate",
        "punch",
    ],
)
def test_failure_beside_background_tasks(action: Action) -> None:
    """A failed call does no harm while background tasks write tables and clear NEED_CHECK."""
    for workload in faults(BACKGROUND, action, errno.EIO):
        assert len(workload.errors) <= MAX_REPORTS[BACKGROUND.name]


@pytest.mark.parametrize("action", ["write", "reserve", "truncate"])
def test_host_that_is_full_for_a_while(action: Action) -> None:
    """On a host that is full from any call on, only requests for new space fail.

    When the host has space again, every request succeeds.
    """
    for workload in faults(TOGETHER, action, errno.ENOSPC, lasting=True):
        assert all(isinstance(error, NoSpaceError) for error in workload.errors)


@pytest.mark.parametrize("action", ["write", "datasync", "read"])
def test_failure_around_the_free_list(action: Action) -> None:
    """A free list that cannot be written completely is left out."""
    for workload in faults(LISTED, action, errno.EIO):
        assert action == "datasync" or len(workload.errors) <= MAX_REPORTS[LISTED.name]
        if workload.clean and not workload.errors:
            # No request failed, so the failed call was for the list or for the scan it needs.
            assert not header_of(workload.file.content).has_free_list
