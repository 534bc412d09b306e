"""Reads that a disk starts in a native thread, which answers them by itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.hostio import hostcalls
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.posixreader import _MAX_WAITING_CALLS
from qedfuse.hostio.threadcalls import ThreadCalls
from tests.support.disks import build_image, opened
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLUSTER = 4096


class Calls(ThreadCalls):
    """Host calls that keep the reads that are started.

    Attributes:
        started: The file offset of each read, and the function to call at its end.
        refusal: What `start_read` raises.
    """

    can_start_reads = True

    def __init__(self) -> None:
        """Start without reads."""
        self.started: list[tuple[int, Callable[[int, int], object]]] = []
        self.refusal: OSError | None = None

    def start_read(self, *call: object) -> None:
        """Keep a read."""
        if self.refusal is not None:
            raise self.refusal
        _fd, offset, _view, answer, ended = call
        assert answer == "answer"
        self.started.append((offset, ended))  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Let host files use calls that keep the started reads."""
    made = Calls()
    monkeypatch.setattr("qedfuse.hostio.posixreader.host_calls", lambda: made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PosixFile]:
    """Open a file of 1 MiB."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    opened_file = PosixFile.open(str(path))
    yield opened_file
    opened_file.close()


@pytest.fixture
def _uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no data be in the page cache."""

    def miss(*_arguments: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", miss)


def start(file: PosixFile, offset: int, results: list[int]) -> bool:
    """Try a read inline, then start it; return whether it was started."""
    view = memoryview(bytearray(CLUSTER))
    return not file.try_read(offset, view) and file.try_start_read(
        offset, view, lambda: "answer", results.append
    )


async def test_a_read_is_not_started_if_its_data_may_be_in_memory(
    calls: Calls, file: PosixFile
) -> None:
    """A read that `try_read` has not looked for is not started while reads are inline."""
    assert not file.try_start_read(0, memoryview(bytearray(8)), lambda: "answer", print)
    assert calls.started == []


@pytest.mark.usefixtures("_uncached")
async def test_the_end_of_a_started_read_is_reported(calls: Calls, file: PosixFile) -> None:
    """The function that is called at the end of a read gets the bytes read, or the errno."""
    results: list[int] = []
    assert start(file, 0, results)
    assert start(file, CLUSTER, results)
    assert [offset for offset, _ in calls.started] == [0, CLUSTER]
    calls.started[1][1](-5, 1000)
    calls.started[0][1](CLUSTER, 100_000)
    assert results == [-5, CLUSTER]


@pytest.mark.usefixtures("_uncached")
async def test_one_file_does_not_occupy_all_threads(calls: Calls, file: PosixFile) -> None:
    """At most `_MAX_WAITING_CALLS` reads of a file are in threads at a time; an end makes room."""
    for _ in range(_MAX_WAITING_CALLS):
        assert start(file, 0, [])
    assert not start(file, 0, [])
    calls.started[0][1](CLUSTER, 100_000)
    assert start(file, 0, [])
    assert not start(file, 0, [])


@pytest.mark.usefixtures("_uncached")
async def test_a_read_for_which_there_is_no_thread_is_not_counted(
    calls: Calls, file: PosixFile
) -> None:
    """If no thread can be created, the error is raised, and later reads can be started."""
    calls.refusal = OSError("no thread")
    for _ in range(_MAX_WAITING_CALLS + 1):
        with pytest.raises(OSError, match="no thread"):
            start(file, 0, [])
    calls.refusal = None
    assert start(file, 0, [])


async def test_threads_of_trio_do_not_start_reads(file: PosixFile) -> None:
    """With threads of trio no read is started."""
    calls = hostcalls.make_host_calls("threads")
    assert not calls.can_start_reads
    with pytest.raises(NotImplementedError):
        calls.start_read(file.fd, 0, memoryview(bytearray(8)), None, print)


class StartingFile(MemoryFile):
    """A host file that keeps the reads that are started.

    Attributes:
        started: The functions to call at the ends of the reads.
    """

    def __init__(self, content: bytes | bytearray) -> None:
        """Start with ``content``."""
        super().__init__(content)
        self.started: list[Callable[[int], object]] = []

    def try_start_read(self, *call: object) -> bool:
        """Keep a read."""
        _offset, _view, take_answer, ended = call
        take_answer()  # type: ignore[operator]
        self.started.append(ended)  # type: ignore[arg-type]
        return True


async def test_a_cluster_is_not_reused_while_a_started_read_may_read_it() -> None:
    """A cluster that is discarded stays in quarantine until the started reads have ended (D5)."""
    file = StartingFile(build_image(8 * CLUSTER, {0: b"a", 1: b"b"}))
    results: list[int] = []
    async with opened(file) as disk:
        await disk.read(0, 1)  # the table is in memory then
        assert disk.try_start_read(0, CLUSTER, list, results.append)
        assert not disk.try_start_read(4 * CLUSTER, CLUSTER, list, results.append), "a hole"
        await disk.discard(0, CLUSTER)
        await disk.flush()
        assert disk.statistics().quarantined_clusters == 1
        file.started[0](CLUSTER)
        assert results == [CLUSTER]
        await disk.flush()
        assert disk.statistics().quarantined_clusters == 0
