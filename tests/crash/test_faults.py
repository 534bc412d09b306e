"""A host that fails once, or is full for a while, at any point of a workload (D7, S5)."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import Action, _Fault

STATES: Final = 120
"""How many states beside the prefixes are looked at after each fault."""

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
"""One task and nothing in the background: who fails is who is told."""

PLAIN: Final = replace(ALONE, name="plain", options=UNCOMPACTED)
"""The same without the compaction at the end, whose failures cost space and are logged."""

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

pytestmark = pytest.mark.usefixtures("quiet")


class Host(FailingFile):
    """A failing host that remembers what the file was like when it failed first."""

    def __init__(self, inner: RecordingFile) -> None:
        """Stand in front of a recording."""
        super().__init__(inner)
        self.recording = inner
        self.first_struck: Action | None = None
        self.bit_was_set = False

    def _raise(self, fault: _Fault, action: Action) -> None:
        if self.first_struck is None:
            self.first_struck = action
            self.bit_was_set = header_of(self.recording.content).need_check
        super()._raise(fault, action)


class Failing(Workload):
    """A workload on a host that fails."""

    def __init__(self, case: Case) -> None:
        """Prepare a case; faults are put into ``host``."""
        super().__init__(case, 5)
        self.host: Host = Host(self.file)
        self.may_fail = True
        self.last = self.use_on

    async def use_on(self, disk: Disk) -> None:
        """See that the disk can be used, or that it is read-only and says why."""
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
            await disk.wait_scanned()
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
        """See that whatever a crash after all this leaves is sound, and the file as it is too."""
        assert self.history.misread == []
        explorer = Explorer(self.case.name, 0, self.history, self.bases)
        found = trio.run(explorer.explore, STATES)
        assert not found.violations, found.report()
        bit = header_of(self.file.content).need_check
        if self.host.first_struck == "datasync":
            # The disk's close reports it too, and the bit is not cleared any more.
            assert isinstance(self.errors[-1], HostError)
            assert bit >= self.host.bit_was_set
        elif self.host.first_struck:
            assert bit <= (not self.clean), "a disk that can be used is closed cleanly"


def calls(case: Case, action: Action) -> int:
    """Count how often a case does something to the host."""
    workload = Failing(case)
    workload.play(5)
    assert workload.errors == []
    return workload.host.calls[action]


def faults(
    case: Case, action: Action, number: int, *, short: int = 0, lasting: bool = False
) -> Iterator[Failing]:
    """Carry out a case again and again, with a failure at each step."""
    count = calls(case, action)
    assert count, f"the case does {action} {count} times"
    for nth in range(1, count + 1):
        workload = Failing(case)
        workload.host.fail(action, nth, number, short=short, lasting=lasting)
        workload.play(5)
        assert workload.host.first_struck == action, nth
        workload.judge()
        yield workload


@pytest.mark.parametrize("short", [0, 512, 1536])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_fails(number: int, short: int) -> None:
    """Who waits is told, with the host's error; all else goes on."""
    for workload in faults(PLAIN, "write", number, short=short):
        (error,) = workload.errors
        assert isinstance(error, HostError)
        assert error.errno == number
        assert isinstance(error, NoSpaceError) == (number == errno.ENOSPC)


@pytest.mark.parametrize(
    "case",
    [ALONE, TOGETHER, BACKGROUND],
    ids=lambda case: case.name,
)
def test_a_datasync_fails(case: Case) -> None:
    """The disk is read-only from then on, says why, and keeps NEED_CHECK."""
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
def test_another_call_fails(action: Action) -> None:
    """A failure of a call that changes nothing is reported, or is without effect."""
    for workload in faults(ALONE, action, errno.EIO):
        assert all(isinstance(error, HostError) for error in workload.errors)
        assert len(workload.errors) < 3


@pytest.mark.parametrize("action", ["write", "reserve", "truncate"])
def test_failures_under_others(action: Action) -> None:
    """What fails for one request does not harm those that are under way beside it."""
    for workload in faults(TOGETHER, action, errno.EIO):
        assert len(workload.errors) < 4


@pytest.mark.parametrize(
    "action",
    [
        "write",
        "truncate",
        "punch",
    ],
)
def test_failures_in_the_background(action: Action) -> None:
    """The same when tables are written back, and NEED_CHECK is cleared, in between."""
    for workload in faults(BACKGROUND, action, errno.EIO):
        assert len(workload.errors) < 4


@pytest.mark.parametrize("action", ["write", "reserve", "truncate"])
def test_full_for_a_while(action: Action) -> None:
    """From any call on the host is full: reads go on, and when it has room so does all else."""
    for workload in faults(TOGETHER, action, errno.ENOSPC, lasting=True):
        assert all(isinstance(error, NoSpaceError) for error in workload.errors)


@pytest.mark.parametrize("action", ["write", "datasync", "read"])
def test_failures_around_the_free_list(action: Action) -> None:
    """A list that cannot be written is left out; whoever reads one finds it whole."""
    for workload in faults(LISTED, action, errno.EIO):
        assert action == "datasync" or len(workload.errors) < 3
        if workload.clean and not workload.errors:
            # Then it is the list that could not be written, or the scan that it needs.
            assert not header_of(workload.file.content).free_list
