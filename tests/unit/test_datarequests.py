"""Deferred reads: who answers them, and what happens if no thread can."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from pyfuse3 import FUSEError
from trio.testing import wait_all_tasks_blocked

from qedfuse.mount.fuse.datarequests import DataRequests
from qedfuse.mount.fuse.requestcounters import READ, RequestCounters

if TYPE_CHECKING:
    from collections.abc import Callable

HANDLE = 3


class Pending:
    """Stands for the C object that answers a read.

    Attributes:
        answers: The data, or the errno, of each answer.
    """

    def __init__(self) -> None:
        """Start without an answer."""
        self.answers: list[bytes | int] = []

    def capsule(self) -> object:
        """Return what a thread answers with."""
        return self

    def data(self, data: bytes) -> None:
        """Answer with data."""
        self.answers.append(data)

    def error(self, number: int) -> None:
        """Answer with an errno."""
        self.answers.append(number)


class Disk:
    """A disk whose data is not in memory.

    Attributes:
        content: What `try_read` returns.
        tried: How often `try_read` was called.
        should_try_read: Whether the image's file is read inline.
        can_start: Whether `try_start_read` starts a read.
        refusal: What `try_start_read` raises after it has taken the answer.
        started: The functions that must be called at the end of the started reads.
        counted: The files and lengths that `count_read` has counted.
    """

    def __init__(self) -> None:
        """Start reads, and refuse nothing."""
        self.content: memoryview | None = None
        self.tried = 0
        self.should_try_read = True
        self.can_start = True
        self.refusal: Exception | None = None
        self.started: list[Callable[[int], object]] = []
        self.counted: list[tuple[str, int]] = []

    def count_read(self, file: str, length: int) -> None:
        """Count a read of a file."""
        self.counted.append((file, length))

    def try_read(self, _start: int, _length: int) -> memoryview | None:
        """Return the content, if it is in memory."""
        self.tried += 1
        return self.content

    def try_locate(self, start: int, _length: int) -> tuple[int, int, str]:
        """Return a descriptor, an offset in its file, and the file."""
        return (5, start + 65536, "file")

    def try_start_read(
        self,
        _start: int,
        _length: int,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read, unless that is not possible."""
        if not self.can_start:
            return False
        take_answer()
        if self.refusal is not None:
            raise self.refusal
        self.started.append(ended)
        return True


class Mount:
    """The requests of a mount with one disk.

    Attributes:
        disk: The disk.
        pending: What answers the deferred reads, oldest first.
        slow_reads: The reads that reached the slow path.
        error: What the slow path raises.
        is_cached: Whether the page cache holds the data, so that a reply from a file succeeds.
        replied: The descriptor and the file offset of each attempt to reply from a file.
        requests: The object under test.
        counters: What counts the requests to the disk.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        """Make an object under test whose tasks run in ``nursery``."""
        self.disk = Disk()
        self.pending: list[Pending] = []
        self.slow_reads: list[tuple[int, int, int]] = []
        self.error: FUSEError | None = None
        self.is_cached = True
        self.replied: list[tuple[int, int]] = []
        self.counters = RequestCounters()
        exported = SimpleNamespace(disk=self.disk, counters=self.counters)
        fast = SimpleNamespace(
            disk_of=lambda handle: exported if handle == HANDLE else None, write=None, fsync=None
        )
        operations = SimpleNamespace(fast=fast, read_slowly=self._read_slowly)
        self.requests = DataRequests(
            cast("Any", operations), self._reply_from_file, cast("Any", self._defer), nursery
        )

    def _reply_from_file(self, fd: int, offset: int) -> bool:
        self.replied.append((fd, offset))
        return self.is_cached

    def _defer(self) -> Pending:
        self.pending.append(Pending())
        return self.pending[-1]

    async def _read_slowly(self, handle: int, offset: int, size: int) -> bytes:
        self.slow_reads.append((handle, offset, size))
        if self.error is not None:
            raise self.error
        return b"slow"


async def test_data_in_memory_is_returned(nursery: trio.Nursery) -> None:
    """A read whose data is in memory is answered, not deferred."""
    mount = Mount(nursery)
    mount.disk.content = memoryview(b"data")
    assert mount.requests.read(HANDLE, 0, 4) is mount.disk.content
    assert mount.pending == []


async def test_a_read_that_cannot_be_deferred_is_left_to_pyfuse3(nursery: trio.Nursery) -> None:
    """A read for which no thread is available, or of an unknown handle, is not deferred."""
    mount = Mount(nursery)
    mount.disk.can_start = False
    assert mount.requests.read(HANDLE, 0, 4) is None
    assert mount.requests.read(HANDLE + 1, 0, 4) is None
    assert mount.pending == []


async def test_a_read_of_a_file_that_is_not_read_inline_is_deferred_without_a_try(
    nursery: trio.Nursery,
) -> None:
    """After misses a read is deferred first; it is tried only if it cannot be deferred."""
    mount = Mount(nursery)
    mount.disk.content = memoryview(b"zeros")
    mount.disk.should_try_read = False
    assert mount.requests.read(HANDLE, 0, 4) is None
    assert (len(mount.disk.started), mount.disk.tried) == (1, 0)
    mount.disk.can_start = False
    assert mount.requests.read(HANDLE, 0, 4) is mount.disk.content
    assert mount.disk.tried == 1


async def test_a_read_of_all_bytes_needs_no_task(nursery: trio.Nursery) -> None:
    """A deferred read whose thread has read all bytes is not answered a second time."""
    mount = Mount(nursery)
    assert mount.requests.read(HANDLE, 0, 4) is None
    mount.disk.started.pop()(4)
    await wait_all_tasks_blocked()
    assert mount.slow_reads == []
    assert [pending.answers for pending in mount.pending] == [[]]
    counted = mount.counters.statistics(READ)
    assert (counted.requests, counted.bytes, counted.fast) == (1, 4, 0)


@pytest.mark.parametrize("result", [3, 0, -errno.EIO])
async def test_a_read_that_its_thread_cannot_answer_takes_the_slow_path(
    result: int, nursery: trio.Nursery
) -> None:
    """After a short or failed read in a thread the slow path answers, with data or an error."""
    mount = Mount(nursery)
    for _ in range(2):
        assert mount.requests.read(HANDLE, 8, 4) is None
    mount.disk.started[0](result)
    await wait_all_tasks_blocked()
    mount.error = FUSEError(errno.EUCLEAN)
    mount.disk.started[1](result)
    await wait_all_tasks_blocked()
    assert mount.slow_reads == [(HANDLE, 8, 4)] * 2
    assert [pending.answers for pending in mount.pending] == [[b"slow"], [errno.EUCLEAN]]


async def test_a_deferred_read_whose_thread_is_refused_takes_the_slow_path(
    nursery: trio.Nursery,
) -> None:
    """If no thread can be created for a deferred read, the slow path answers it."""
    mount = Mount(nursery)
    mount.disk.refusal = OSError(errno.EAGAIN, "no thread")
    assert mount.requests.read(HANDLE, 0, 4) is None
    await wait_all_tasks_blocked()
    assert [pending.answers for pending in mount.pending] == [[b"slow"]]
    await mount.requests.drain()


async def test_draining_waits_for_the_threads(nursery: trio.Nursery) -> None:
    """`drain` returns when no thread reads for a deferred read any more, not earlier."""
    mount = Mount(nursery)
    await mount.requests.drain()
    for _ in range(2):
        mount.requests.read(HANDLE, 0, 4)
    drained = trio.Event()

    async def drain() -> None:
        await mount.requests.drain()
        drained.set()

    nursery.start_soon(drain)
    for ended in mount.disk.started:
        await wait_all_tasks_blocked()
        assert not drained.is_set()
        ended(4)
    await wait_all_tasks_blocked()
    assert drained.is_set()


@pytest.mark.parametrize("size", [1 << 15, 1 << 19])
async def test_a_long_read_is_answered_from_the_page_cache(
    size: int, nursery: trio.Nursery
) -> None:
    """A read of 32 KiB to 512 KiB is answered from the file, if its data is in the page cache."""
    mount = Mount(nursery)
    mount.disk.content = memoryview(b"data")
    assert mount.requests.read(HANDLE, 4096, size) is None
    assert mount.replied == [(5, 69632)]
    assert mount.disk.counted == [("file", size)]
    mount.is_cached = False
    assert mount.requests.read(HANDLE, 4096, size) is mount.disk.content
    assert mount.pending == []


@pytest.mark.parametrize("size", [(1 << 15) - 1, (1 << 19) + 1])
async def test_other_reads_are_copied(size: int, nursery: trio.Nursery) -> None:
    """A shorter or longer read is not answered from the file."""
    mount = Mount(nursery)
    mount.disk.content = memoryview(b"data")
    assert mount.requests.read(HANDLE, 4096, size) is mount.disk.content
    assert mount.replied == []
