"""Reads in a queue of the kernel: who answers them, what they keep, and what is left out.

The file of most tests is a pipe, so a read of it ends when the test writes to the pipe.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import select
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE, NATIVE, THREADS
from qedfuse.hostio.pagesource import CheckedUnits, PageSource
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.handles import HANDLE_WRITER
from qedfuse.mount.fuse.queuedreads import queued_reads
from qedfuse.mount.fuse.requestcounters import READ as COUNTED_READ
from qedfuse.mount.fuse.requestcounters import RequestCounters
from tests.support.fusewire import session_of
from tests.support.readsession import BITS, CLUSTER, INODE, Session, Tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.mount.fuse._extraops import Request

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

READS_OF_FILE: Final = 64
"""Maximum number of queued reads of one file."""
READS: Final = 256
"""Maximum number of queued reads."""
MAX_BYTES: Final = 1 << 14
"""Maximum length of a queued read."""


class Queue:
    """A queue, and the reads that it could not make.

    Attributes:
        failed: Handle, guest offset, length and request of each such read.
        fd: The descriptor that shows the end of reads; -1 while there is no queue.
    """

    def __init__(self) -> None:
        """Start without a queue."""
        self.failed: list[tuple[int, int, int, Request]] = []
        self.fd = -1

    def open(self, slow_seconds: float = 60.0) -> None:
        """Make the queue, or skip the test if the kernel refuses it."""
        try:
            self.fd = extraops.open_read_queue(self._answer_slowly, slow_seconds)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
                raise
            pytest.skip(f"no io_uring: {error}")

    def _answer_slowly(self, request: Request, handle: int, offset: int, size: int) -> None:
        self.failed.append((handle, offset, size, request))

    def is_notified(self, seconds: float = 0) -> bool:
        """Return whether the descriptor becomes readable."""
        return bool(select.select([self.fd], [], [], seconds)[0])

    def end(self, reads: int) -> None:
        """End ended reads until ``reads`` are left in the queue."""
        while extraops.queued_reads() > reads:
            assert self.is_notified(20)
            extraops.end_queued_reads()
        assert extraops.queued_reads() == reads

    def close(self) -> None:
        """Remove the queue."""
        if self.fd >= 0:
            extraops.close_read_queue()
            self.fd = -1


class Pipes:
    """Pipes that stand for files, which do not answer before the test writes to them."""

    def __init__(self) -> None:
        """Start without one."""
        self._ends: list[int] = []

    def make(self) -> tuple[int, int]:
        """Return the end from which reads read, and the end to which the test writes."""
        reader, writer = os.pipe()
        self._ends += [reader, writer]
        return reader, writer

    def close(self) -> None:
        """Close all ends."""
        while self._ends:
            os.close(self._ends.pop())


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    """Make pipes, and close them."""
    made = Pipes()
    yield made
    made.close()


@pytest.fixture
def session() -> Iterator[Session]:
    """Make a session, and end it."""
    with session_of(Session()) as made:
        yield made


@pytest.fixture
def queue(session: Session, pipes: Pipes) -> Iterator[Queue]:
    """Make a queue of a session, and remove it; reads that the test has left end first."""
    assert session.asked == []
    made = Queue()
    made.open()
    yield made
    pipes.close()
    made.end(0)
    made.close()


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    """Make the tables of an image whose reads are not tried inline."""
    made = Tables(tmp_path / "file")
    made.policy.is_inline = False
    yield made
    made.close()


@pytest.fixture
def counters(session: Session) -> RequestCounters:
    """Let the extension count the requests of the session."""
    made = RequestCounters()
    session.count(made)
    return made


def test_a_read_is_answered_when_its_data_has_arrived(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """A queued read gets an answer after its end, with the bytes of the file."""
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    number = session.send(0, 8, INODE | HANDLE_WRITER)
    assert (session.asked, session.wire.answers) == ([], [])
    assert extraops.queued_reads() == 1
    assert not queue.is_notified()
    extraops.end_queued_reads()
    assert extraops.queued_reads() == 1
    os.write(writer, b"contents")
    assert queue.is_notified(20)
    assert session.wire.answers == [], "the answer is given by the event loop"
    extraops.end_queued_reads()
    assert session.wire.answers == [(number, 0, b"contents")]
    assert extraops.queued_reads() == 0
    assert not queue.is_notified()
    assert queue.failed == []


def test_queued_reads_are_counted_at_their_end(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes, counters: RequestCounters
) -> None:
    """A queued read counts when it is answered, and is not one that was answered in one step."""
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    session.send(0, 8)
    assert counters.statistics(COUNTED_READ).requests == 0
    os.write(writer, b"contents")
    queue.end(0)
    found = counters.statistics(COUNTED_READ)
    assert (found.requests, found.bytes, found.fast, found.errors) == (1, 8, 0, 0)
    assert sum(found.histogram) == 1
    assert found.seconds > 0
    assert tables.file_reads.tolist() == [1, 8, 0, 0]


def test_a_queued_read_that_fails_is_left_to_the_slow_path(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes, counters: RequestCounters
) -> None:
    """A queued read with too few bytes is not counted, because the function that gets it counts."""
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    session.send(0, 8)
    os.write(writer, b"short")
    queue.end(0)
    assert len(queue.failed) == 1
    assert counters.statistics(COUNTED_READ).requests == 0
    assert tables.file_reads.tolist() == [0, 0, 0, 0]


def test_all_reads_of_a_burst_are_queued(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """Reads of different disks end in any order, and each gets the bytes of its own file."""
    files = [pipes.make() for _ in range(4)]
    session.show_all({INODE + at: tables.arguments(files[at][0]) for at in range(4)})
    numbers = [session.queue(8 * at, 8, INODE + at) for at in range(1, 4)]
    numbers.insert(0, session.send(0, 8, INODE))
    assert extraops.queued_reads() == 4
    for left, at in ((3, 2), (2, 0), (1, 3), (0, 1)):
        os.write(files[at][1], b"disk %3d" % at)
        queue.end(left)
        assert session.wire.answers.pop() == (numbers[at], 0, b"disk %3d" % at)
        assert session.wire.answers == []


def test_data_in_the_page_cache_is_answered_with_the_burst(
    session: Session, queue: Queue, tables: Tables
) -> None:
    """A read that need not wait is answered right after the burst, and the descriptor stays still.

    After some such reads in a row the event loop tries reads inline again.
    """
    session.show(*tables.arguments())
    for at in range(4):
        assert not tables.policy.is_inline
        assert session.read(at * CLUSTER, 100) == tables.content[(at + 1) * CLUSTER :][:100]
        assert not queue.is_notified()
    assert tables.policy.is_inline


def test_a_read_that_waits_interrupts_the_row_of_cached_ones(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """Only reads in a row that need not wait let the event loop try reads inline again."""
    reader, writer = pipes.make()
    session.show_all({INODE: tables.arguments(), INODE + 1: tables.arguments(reader)})
    for _ in range(3):
        assert session.read(0, 8) is not None
    session.send(0, 8, INODE + 1)
    os.write(writer, bytes(8))
    queue.end(0)
    for _ in range(3):
        assert session.read(0, 8) is not None
        assert not tables.policy.is_inline
    assert session.read(0, 8) is not None
    assert tables.policy.is_inline


def test_a_read_stays_in_its_epoch_until_it_has_ended(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """What waits for an epoch waits for the queued reads of the epoch, and for no later ones."""
    reader, writer = pipes.make()
    other, other_writer = pipes.make()
    session.show_all({INODE: tables.arguments(reader), INODE + 1: tables.arguments(other)})
    session.send(0, 8)
    epoch = tables.epochs.advance()
    session.send(0, 8, INODE + 1)
    assert not tables.epochs.is_drained(epoch)
    os.write(writer, bytes(8))
    queue.end(1)
    assert tables.epochs.is_drained(epoch)
    later = tables.epochs.advance()
    assert not tables.epochs.is_drained(later)
    os.write(other_writer, bytes(8))
    queue.end(0)
    assert tables.epochs.is_drained(later)


@pytest.mark.parametrize("content", [b"", b"cut"], ids=["end of file", "short"])
def test_a_short_read_takes_the_slow_path(
    content: bytes, session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """If there are too few bytes, the function gets the request, and answers it later."""
    reader = pipes.make()[0]
    own, writer = os.pipe()
    os.dup2(own, reader)
    os.close(own)
    session.show(*tables.arguments(reader))
    number = session.send(CLUSTER + 5, 8, INODE | HANDLE_WRITER)
    os.write(writer, content)
    os.close(writer)
    queue.end(0)
    assert session.wire.answers == []
    ((handle, offset, size, request),) = queue.failed
    assert (handle, offset, size) == (INODE | HANDLE_WRITER, CLUSTER + 5, 8)
    assert tables.epochs.is_drained(tables.epochs.advance())
    request.data(b"the slow")
    assert session.wire.answers == [(number, 0, b"the slow")]


def test_a_failed_read_takes_the_slow_path(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """If the kernel reports an error, the function gets the request with the end of the burst."""
    writer = pipes.make()[1]
    session.show(*tables.arguments(writer))
    number = session.send(0, 8)
    assert extraops.queued_reads() == 0
    ((_, _, _, request),) = queue.failed
    request.error(errno.EIO)
    assert session.wire.answers == [(number, -errno.EIO, b"")]
    assert tables.epochs.is_drained(tables.epochs.advance())


def test_reads_that_the_kernel_does_not_take_use_the_slow_path(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """If reads cannot be submitted, as in another thread, the function gets all of the burst."""
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    session.send(0, 8)
    for at in range(1, 4):
        session.queue(at, 8)
    thread = threading.Thread(target=session.send, args=(0, 8))
    thread.start()
    thread.join()
    assert sorted(offset for _, offset, _, _ in queue.failed) == [0, 1, 2, 3]
    assert extraops.queued_reads() == 1, "the read that was submitted before"
    os.write(writer, b"contents")
    queue.end(0)
    assert [data for _, _, data in session.wire.answers] == [b"contents"]
    for _ in range(READS_OF_FILE):
        session.send(0, 8)
    assert extraops.queued_reads() == READS_OF_FILE, "reads that were not taken do not count"
    os.write(writer, bytes(8 * READS_OF_FILE))
    queue.end(0)


def test_an_exception_of_the_function_is_answered(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the function raises, the exception is reported, and the kernel gets an answer."""
    reported: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: reported.append(args.exc_value))
    session.show(*tables.arguments(pipes.make()[1]))
    monkeypatch.setattr(queue, "failed", None)
    number = session.send(0, 8)
    assert [type(error) for error in reported] == [AttributeError]
    reported.clear()
    assert session.wire.answers == [(number, -errno.EINTR, b"")]
    monkeypatch.undo()


def test_a_file_that_does_not_answer_leaves_room_for_others(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """A limited number of reads of one file are queued, and of all files; others are passed on."""
    files = [pipes.make() for _ in range(5)]
    session.show_all({INODE + at: tables.arguments(files[at][0]) for at in range(5)})
    for at in range(4):
        for _ in range(READS_OF_FILE):
            session.send(0, 8, INODE + at)
        assert session.asked == []
        session.send(0, 8, INODE + at)
        assert session.asked.pop() == (0, 8)
        assert extraops.queued_reads() == READS_OF_FILE * (at + 1)
    assert extraops.queued_reads() == READS
    session.send(0, 8, INODE + 4)
    assert session.asked.pop() == (0, 8)
    os.write(files[2][1], bytes(8))
    queue.end(READS - 1)
    session.send(0, 8, INODE + 4)
    assert session.asked == []
    session.wire.answers.clear()
    for _, writer in files:
        os.write(writer, bytes(8 * READS_OF_FILE))
    queue.end(0)
    assert len(session.wire.answers) == READS
    assert queue.failed == []


def test_long_reads_are_passed_on(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """A read that is longer than the limit is not queued."""
    reader, writer = pipes.make()
    cluster_bits = 15
    session.show(*tables.arguments(reader)[:5], cluster_bits, 0, *tables.arguments()[7:])
    session.send(0, MAX_BYTES)
    assert session.asked == []
    session.send(0, MAX_BYTES + 1)
    assert session.asked == [(0, MAX_BYTES + 1)]
    os.write(writer, bytes(range(256)) * (MAX_BYTES // 256))
    queue.end(0)
    assert [data[-256:] for _, _, data in session.wire.answers] == [bytes(range(256))]


def test_files_that_the_kernel_would_read_in_threads_are_passed_on(
    session: Session, queue: Queue, tables: Tables
) -> None:
    """The policy of a file decides whether its reads are queued."""
    tables.policy.can_queue = False
    session.show(*tables.arguments())
    assert session.read(0, 8) is None
    tables.policy.can_queue = True
    assert session.read(0, 8) is not None
    tables.policy.disable_inline()
    assert session.read(0, 8) is None
    assert queue.failed == []


@pytest.mark.parametrize("has_server", [False, True])
def test_files_of_a_server_are_not_queued(
    has_server: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy of a file on a file system that asks a server does not allow it to be queued."""
    monkeypatch.setattr("qedfuse.hostio.posixfile.waits_for_server", lambda _fd: has_server)
    path = tmp_path / "file"
    path.write_bytes(b"")
    file = PosixFile.open(str(path))
    assert file.read_policy.can_queue != has_server
    file.close()
    assert not ReadPolicy().can_queue


def test_files_with_checked_units_are_not_queued(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """A file whose bytes on the disk must be compared with checksums is not read by the queue."""
    reader, _ = pipes.make()
    units = CheckedUnits(
        bytearray(b"\1" * 9), memoryview(b""), BITS, 9 * CLUSTER, 9 * CLUSTER + 1, 0, print
    )
    for given, queued in ((units, 0), (None, 1)):
        source = PageSource(tables.policy, reader, given)
        session.show(*tables.arguments()[:4], (source,), *tables.arguments()[5:])
        session.send(0, 8)
        assert extraops.queued_reads() == queued
        assert len(session.asked) == 1 - queued
        session.asked.clear()
    assert not queue.is_notified()


def test_a_read_that_was_tried_inline_is_queued_and_counts_as_a_miss(
    session: Session, queue: Queue, tables: Tables, tmp_path: Path
) -> None:
    """A read that has not found all bytes inline is queued; an error is passed on instead.

    Only the file's end is certain not to be in the page cache, so the read fails in the queue too.
    """
    tables.policy.is_inline = True
    session.show(*tables.arguments())
    os.truncate(tmp_path / "file", 2 * CLUSTER - 1)
    for misses in range(1, 4):
        session.send(0, CLUSTER)
        assert (session.asked, len(queue.failed)) == ([], misses)
        assert tables.policy.misses == misses
    session.send(0, CLUSTER)
    assert not tables.policy.is_inline
    tables.policy.is_inline = True
    with (tmp_path / "file").open("ab") as file:
        session.show(*tables.arguments(file.fileno()))
        assert session.read(0, 8) is None, "not open for reading"


def test_after_a_slow_submission_no_read_is_queued(
    session: Session, queue: Queue, tables: Tables
) -> None:
    """If the kernel has kept the event loop waiting, reads are passed on for a while."""
    session.show(*tables.arguments())
    assert session.read(0, 8) is not None
    assert session.read(0, 8) is not None
    queue.close()
    queue.open(slow_seconds=0.0)
    assert session.read(0, 8) is not None
    assert session.read(0, 8) is None


ARRIVALS: Final = """
import os, sys
orders, reads, writer = map(int, sys.argv[1:])
while os.read(orders, 1):
    for _ in range(reads):
        os.write(writer, bytes(8))
"""
"""A program that lets the data of a number of reads arrive one by one for each byte that it reads.

It is a process of its own, because a thread would wait for the GIL, and data would not arrive while
the kernel ends other reads."""


@pytest.mark.parametrize("sleeps", [False, True], ids=["polling", "sleeping"])
def test_data_may_arrive_at_any_time(
    sleeps: bool,  # noqa: FBT001
    session: Session,
    queue: Queue,
    tables: Tables,
    pipes: Pipes,
) -> None:
    """Reads whose data arrives while others are being ended are neither forgotten nor waited for.

    The kernel may say that there is work although it has done all of it.
    """
    reader, writer = pipes.make()
    orders, give = pipes.make()
    session.show(*tables.arguments(reader))
    words = [sys.executable, "-c", ARRIVALS, str(orders), str(READS_OF_FILE), str(writer)]
    with subprocess.Popen(words, pass_fds=[orders, writer]) as process:
        for _ in range(500):
            for _ in range(READS_OF_FILE):
                session.send(0, 8)
            os.write(give, b"x")
            while extraops.queued_reads():
                if sleeps:
                    assert queue.is_notified(20)
                extraops.end_queued_reads()
            assert len(session.wire.answers) == READS_OF_FILE
            session.wire.answers.clear()
        process.kill()


def claim_work() -> None:
    """Set the flag by which the kernel says that there is work (IORING_SQ_TASKRUN)."""
    parameters = ctypes.create_string_buffer(120)
    number_of_io_uring_setup = 425
    fd = ctypes.CDLL(None).syscall(number_of_io_uring_setup, 1, parameters)
    assert fd >= 0
    os.close(fd)
    offset_of_flags = struct.unpack_from("=I", parameters, 56)[0]
    starts = [
        int(line.partition("-")[0], 16)
        for line in Path("/proc/self/maps").read_text("ascii").splitlines()
        if line.endswith("anon_inode:[io_uring]") and line.split()[2] == "00000000"
    ]
    assert len(starts) == 1
    ctypes.c_uint32.from_address(starts[0] + offset_of_flags).value |= 4


def test_the_kernel_may_claim_work_that_it_has_done(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """If the flag is set although no read has ended, `end_queued_reads` returns nevertheless.

    The kernel adds work to a list before it sets the flag, so the work may be done in between.
    """
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    session.send(0, 8)
    claim_work()
    extraops.end_queued_reads()
    assert extraops.queued_reads() == 1
    os.write(writer, bytes(8))
    queue.end(0)
    assert not queue.is_notified()


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the descriptors of the queues that `queued_reads` makes."""
    monkeypatch.delenv(HOST_CALLS_VARIABLE, raising=False)
    made: list[int] = []
    open_read_queue = extraops.open_read_queue

    def note(*arguments: Any) -> int:  # noqa: ANN401  those of the function
        try:
            made.append(open_read_queue(*arguments))
        except OSError as error:
            pytest.skip(f"no io_uring: {error}")
        return made[0]

    monkeypatch.setattr(extraops, "open_read_queue", note)
    return made


async def test_a_notification_without_a_read_is_forgotten(
    session: Session, tables: Tables, descriptors: list[int]
) -> None:
    """The event loop does not stay awake if it is notified of reads that have been answered."""
    session.show(*tables.arguments())
    async with queued_reads(lambda *_: None):
        for _ in range(3):
            os.eventfd_write(descriptors[0], 1)
            await wait_all_tasks_blocked(0.01)
            assert not select.select(descriptors, [], [], 0)[0]


async def test_a_late_notification_finds_no_closed_descriptor(
    session: Session, tables: Tables, descriptors: list[int]
) -> None:
    """A queue can be closed just when the event loop is notified of a read, in either order."""
    session.show(*tables.arguments())
    for _ in range(50):
        async with queued_reads(lambda *_: None):
            await wait_all_tasks_blocked()
            duplicate = os.dup(descriptors[0])
            os.eventfd_write(descriptors[0], 1)
            # The next pass of the event loop wakes both tasks, in random order.
            await trio.lowlevel.wait_readable(duplicate)
            os.close(duplicate)
        descriptors.clear()


@pytest.mark.usefixtures("descriptors")
async def test_a_queue_can_be_closed_before_its_task_has_run(
    session: Session, tables: Tables
) -> None:
    """A block that fails before its first checkpoint does not wait for the end of the queue."""
    session.show(*tables.arguments())
    with trio.fail_after(60), pytest.raises(ZeroDivisionError):
        async with queued_reads(lambda *_: None):
            raise ZeroDivisionError


async def test_the_end_does_not_wait_for_a_read_that_another_task_has_answered(
    session: Session, tables: Tables, pipes: Pipes, descriptors: list[int]
) -> None:
    """A queue ends although the notification of its last read was used up elsewhere."""
    reader, writer = pipes.make()

    async def answer_elsewhere() -> None:
        """Answer the read, and empty the descriptor, before the event loop looks at it."""
        await wait_all_tasks_blocked()
        assert extraops.queued_reads() == 1
        os.write(writer, bytes(8))
        while extraops.queued_reads():
            assert select.select(descriptors, [], [], 20)[0]
            extraops.end_queued_reads()
        with suppress(BlockingIOError):
            os.eventfd_read(descriptors[0])

    session.show(*tables.arguments(reader))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery, queued_reads(lambda *_: None):
            session.send(0, 8)
            nursery.start_soon(answer_elsewhere)
    assert extraops.queued_reads() == 0


def test_without_a_queue_reads_are_passed_on(session: Session, tables: Tables) -> None:
    """A read that cannot be tried inline goes to the function if there is no queue."""
    session.show(*tables.arguments())
    assert session.read(0, 8) is None
    extraops.end_queued_reads()
    assert extraops.queued_reads() == 0


def test_a_queue_that_holds_reads_cannot_be_removed(
    session: Session, queue: Queue, tables: Tables, pipes: Pipes
) -> None:
    """Reads keep the queue, and one that ends after its session gets no answer."""
    with pytest.raises(OSError, match="busy"):
        extraops.open_read_queue(lambda *_: None, 1.0)
    files = [pipes.make() for _ in range(2)]
    session.show_all({INODE + at: tables.arguments(files[at][0]) for at in range(2)})
    for at in range(2):
        session.send(0, 8, INODE + at)
    with pytest.raises(RuntimeError, match="reads are queued"):
        extraops.close_read_queue()
    extraops.end()
    os.write(files[0][1], bytes(8))
    os.write(files[1][1], b"cut")
    queue.end(0)
    assert (session.wire.answers, queue.failed) == ([], [])
    assert tables.epochs.is_drained(tables.epochs.advance())


# --- the event loop -------------------------------------------------------------------------


async def test_the_block_waits_for_the_reads(
    session: Session, tables: Tables, pipes: Pipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended reads are answered while the loop sleeps; the block ends after the last of them."""
    monkeypatch.delenv(HOST_CALLS_VARIABLE, raising=False)
    probe = Queue()
    probe.open()  # skips the test
    probe.close()
    reader, writer = pipes.make()
    session.show(*tables.arguments(reader))
    ended = trio.Event()

    async def serve() -> None:
        async with queued_reads(lambda *_: None):
            for _ in range(3):
                session.send(0, 8)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                await serve()
            ended.set()

        async def cancel(scope: trio.CancelScope) -> None:
            await wait_all_tasks_blocked()
            scope.cancel()

        nursery.start_soon(run)
        for left in (2, 1, 0):
            await wait_all_tasks_blocked()
            assert not ended.is_set()
            os.write(writer, bytes(8))
            with trio.fail_after(20):
                while extraops.queued_reads() > left:  # noqa: ASYNC110  the code has no event
                    await trio.sleep(0.001)
        with trio.fail_after(20):
            await ended.wait()
    assert len(session.wire.answers) == 3
    assert session.read(0, 8) is None, "there is no queue any more"


@pytest.mark.parametrize("value", [THREADS, NATIVE])
async def test_the_queue_can_be_turned_off(
    value: str, session: Session, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the environment variable set no read is queued."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, value)
    session.show(*tables.arguments())
    async with queued_reads(lambda *_: None):
        assert session.read(0, 8) is None


async def test_a_kernel_that_refuses_the_queue_is_accepted(
    session: Session, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without io_uring no read is queued, and nothing fails."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "io_uring is turned off")

    monkeypatch.delenv(HOST_CALLS_VARIABLE, raising=False)
    monkeypatch.setattr(extraops, "open_read_queue", refuse)
    session.show(*tables.arguments())
    async with queued_reads(lambda *_: None):
        assert session.read(0, 8) is None


async def test_a_cluster_is_not_reused_while_it_is_read(
    session: Session, queue: Queue, pipes: Pipes, tmp_path: Path
) -> None:
    """A cluster that is discarded while a queued read reads it is free only after the read."""
    path = str(tmp_path / "disk.qed")
    await create_image(path, 64 * CLUSTER, cluster_size=CLUSTER, table_size=1)
    async with open_disk(path, OpenOptions(writable=True)) as disk:
        await disk.write(0, b"old" * CLUSTER)
        await disk.flush()
        found = disk.tables_for_reads()
        assert found.files[0] is not None
        policy = found.files[0].policy
        assert policy.can_queue
        policy.is_inline = False
        reader, writer = pipes.make()
        session.show(*found._replace(files=(PageSource(policy, reader),)))
        old = disk.try_locate(0, 8)
        session.send(0, 8)
        assert (session.asked, extraops.queued_reads()) == ([], 1)
        await disk.discard(0, CLUSTER)
        await disk.flush()
        assert disk.statistics().quarantined_clusters == 1
        os.write(writer, bytes(8))
        queue.end(0)
        await disk.flush()
        assert disk.statistics().quarantined_clusters == 0
        await disk.write(0, b"new" * 100)
        assert disk.try_locate(0, 8) == old, "the cluster is used again"


@pytest.mark.parametrize("seed", range(5))
async def test_queued_reads_return_what_the_disk_returns(
    seed: int, session: Session, queue: Queue, tmp_path: Path
) -> None:
    """Between random changes of a disk, queued reads of any place return its present content."""
    rng = random.Random(seed)
    path = tmp_path / "disk.qed"
    await create_image(str(path), 256 * CLUSTER, cluster_size=CLUSTER, table_size=1)
    count = waited = 0
    async with open_disk(str(path), OpenOptions(writable=True, cache_bytes=1 << 16)) as disk:
        found = disk.tables_for_reads()
        assert found.files[0] is not None
        policy = found.files[0].policy
        session.show(*found)
        for _ in range(100):
            start = rng.randrange(256) * CLUSTER
            match rng.randrange(6):
                case 0:
                    await disk.discard(start, rng.choice([CLUSTER, 20 * CLUSTER]))
                case 1:
                    await disk.flush()
                    with path.open("rb") as file:
                        os.fdatasync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                case _:
                    length = min(rng.choice([512, CLUSTER, 9 * CLUSTER]), disk.size - start)
                    await disk.write(start, rng.randbytes(length))
            expected = {}
            for _ in range(20):
                at, size = rng.randrange(disk.size - 16384), rng.choice([1, 512, CLUSTER])
                policy.is_inline = True  # otherwise no place is returned
                if disk.try_locate(at, size) is None:
                    continue
                policy.is_inline = rng.random() < 0.3
                before = len(session.wire.answers)
                number = session.send(at, size)
                waited += len(session.wire.answers) == before
                expected[number] = (at, size)
            queue.end(0)
            assert session.asked == []
            answers = {number: data for number, _, data in session.wire.answers}
            for number, (at, size) in expected.items():
                assert answers[number] == await disk.read(at, size)
                count += 1
            session.wire.answers.clear()
    assert count > 200
    assert queue.failed == []
