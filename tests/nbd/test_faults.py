"""A server that makes mistakes: right bytes or an error, in bounded time, and good again later."""

from __future__ import annotations

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from qedfuse.errors import HostError, ObjectChangedError, RemoteError
from qedfuse.nbd import attempts, messages
from qedfuse.nbd.connecting import Tls
from qedfuse.nbd.connectionpool import MAX_CONNECTIONS
from qedfuse.nbd.export import open_export
from qedfuse.nbd.extents import SmallSteps
from qedfuse.nbd.opening import open_nbd
from qedfuse.nbd.requests import BlockStatus
from qedfuse.remote import recentfailures
from qedfuse.remote.address import parse_address
from qedfuse.remote.options import Deadlines
from tests.support.faultynbd import (
    CONNECTION_FAULTS,
    REPLY_FAULTS,
    FaultyServer,
    serving_faulty,
    serving_nothing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qedfuse.nbd.nbdfile import NbdFile

DEADLINES: Final = Deadlines(connect_seconds=1, attempt_seconds=0.4, total_seconds=1.5)
PATIENT: Final = Deadlines(connect_seconds=20, attempt_seconds=20, total_seconds=40)
MAX_SECONDS: Final = DEADLINES.total_seconds + 2 * DEADLINES.attempt_seconds + 30
"""After this time a read must have ended, on a machine that is busy."""
LENGTH: Final = 8192

BEGINS: Final = pytest.mark.expect_log("; reads fail until it answers again")
ENDS: Final = pytest.mark.expect_log("x: answers again")
OTHER_FAULTS: Final = tuple(fault for fault in REPLY_FAULTS if fault not in {"drip", "error"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    """Run a server with random content."""
    with serving_faulty(tmp_path, random.Random(2).randbytes(1 << 20)) as found:
        yield found


@contextmanager
def opened(server: FaultyServer, deadlines: Deadlines = DEADLINES) -> Iterator[NbdFile]:
    """Open the export for the block."""
    file = open_nbd(server.connect, "", "x", deadlines)
    try:
        yield file
    finally:
        file.close()


def read(file: NbdFile, offset: int = 0, length: int = LENGTH) -> bytes:
    """Read in this thread."""
    buffer = bytearray(length)
    assert file.read_blocking(offset, memoryview(buffer)) == length
    return bytes(buffer)


def read_in_task(file: NbdFile, offset: int = 0, length: int = LENGTH) -> bytes:
    """Read in a task of a new event loop."""
    return bytes(trio.run(file.pread, offset, length))


READERS: Final = {"thread": read, "task": read_in_task}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_one_wrong_reply_costs_no_wrong_byte(server: FaultyServer, fault: str, reader: str) -> None:
    """After one wrong reply the read is made again, by another connection."""
    server.choose_reply = lambda number: fault if number == 1 else None
    with opened(server, Deadlines(20, 0.4, 40)) as file:
        assert READERS[reader](file) == server.content[:LENGTH]
        assert server.struck[fault] == 1
        assert READERS[reader](file, 100) == server.content[100 : 100 + LENGTH]


@BEGINS
@ENDS
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", [*OTHER_FAULTS, "drip"])
def test_a_server_that_is_always_wrong_is_an_error(
    server: FaultyServer, fault: str, reader: str
) -> None:
    """If every reply is wrong, a read fails in bounded time; later reads work again."""
    server.choose_reply = lambda _number: fault
    with opened(server) as file:
        start = time.monotonic()
        with pytest.raises(RemoteError, match=r"^x: .*$"):
            READERS[reader](file)
        assert time.monotonic() - start < MAX_SECONDS
        assert server.struck[fault] >= 1
        server.choose_reply = lambda _number: None
        assert READERS[reader](file) == server.content[:LENGTH]


@BEGINS
@ENDS
@pytest.mark.parametrize("reader", READERS)
def test_a_failed_read_that_is_repeated_waits_once(
    server: FaultyServer, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read again of what has just failed makes one attempt at most, and then works again.

    A read of another place is not affected.
    """
    monkeypatch.setattr(recentfailures, "_RECENT_SECONDS", 600.0)
    monkeypatch.setattr(recentfailures, "_MAX_REPEATED_SECONDS", 600.0)
    server.choose_reply = lambda _number: "stall"
    with opened(
        server, Deadlines(connect_seconds=20, attempt_seconds=0.4, total_seconds=2)
    ) as file:
        attempts = []
        for offset in (0, 4096, 1 << 19):
            before = server.struck["stall"]
            with pytest.raises(RemoteError):
                READERS[reader](file, offset)
            attempts.append(server.struck["stall"] - before)
        assert attempts[1] <= 1
        assert attempts[0] > 1 < attempts[2]
        server.choose_reply = lambda _number: None
        assert READERS[reader](file) == server.content[:LENGTH]


@pytest.mark.parametrize("reader", READERS)
def test_an_error_of_the_server_is_about_one_read(server: FaultyServer, reader: str) -> None:
    """A range that the server cannot read is an error of one read, and the connection is kept."""
    server.choose_reply = lambda number: "error" if number == 1 else None
    server.choose_connection = lambda number: None if number == 1 else "refuse"
    with opened(server) as file:
        message = "^x: read: found an error of the server: Input/output error$"
        with pytest.raises(RemoteError, match=message):
            READERS[reader](file)
        assert READERS[reader](file) == server.content[:LENGTH]


@pytest.mark.parametrize("fault", CONNECTION_FAULTS)
def test_a_connection_that_cannot_be_made_is_an_error(server: FaultyServer, fault: str) -> None:
    """Opening fails in bounded time with one line, except for a size, which is then the size."""
    server.choose_connection = lambda _number: fault
    start = time.monotonic()
    if fault == "other size":
        with opened(server) as file:
            assert file.size() == len(server.content) + 4096
    else:
        with pytest.raises(RemoteError, match=r"^x: .*$"):
            open_nbd(server.connect, "", "x", DEADLINES)
    assert time.monotonic() - start < MAX_SECONDS
    assert server.struck[fault] == 1


@pytest.mark.parametrize("host", ["", ".x", "a..b", "x" * 64 + ".org", "a\0b"])
def test_a_host_name_that_no_certificate_has_is_refused(server: FaultyServer, host: str) -> None:
    """A name with an empty or long label, or a NUL, is an error of one line when TLS starts."""
    with pytest.raises(RemoteError, match=r"^x: TLS: host name: found '[^\n\0]*', expected .*$"):
        open_nbd(server.connect, "", "x", DEADLINES, tls=Tls(host))


@BEGINS
@ENDS
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", CONNECTION_FAULTS)
def test_a_connection_that_cannot_be_made_again(
    server: FaultyServer, fault: str, reader: str
) -> None:
    """A broken connection that cannot be made again is EIO, or ESTALE for another export."""
    server.choose_connection = lambda number: None if number == 1 else fault
    is_other = fault in {"other size", "no export"}
    with opened(server) as file:
        server.break_connections()
        start = time.monotonic()
        with pytest.raises(ObjectChangedError if is_other else RemoteError, match=r"^x: .*$"):
            READERS[reader](file)
        assert time.monotonic() - start < MAX_SECONDS
        assert server.struck[fault] >= 1
        server.choose_connection = lambda _number: None
        assert READERS[reader](file) == server.content[:LENGTH]


def test_a_second_connection_that_is_refused_is_not_needed(server: FaultyServer) -> None:
    """A server that greets one client only is read through one connection by all threads."""
    server.choose_connection = lambda number: None if number == 1 else "no greeting"
    with opened(server, Deadlines(1, 0.2, 20)) as file, ThreadPoolExecutor(4) as pool:
        while not server.struck["no greeting"]:
            found = list(pool.map(partial(read, file), range(40)))
            assert found == [server.content[at : at + LENGTH] for at in range(40)]
        for _ in range(20):
            list(pool.map(partial(read, file), range(40)))
        assert server.struck["no greeting"] <= MAX_CONNECTIONS - 1


@BEGINS
@ENDS
def test_a_read_without_time_leaves_a_connection_that_works(server: FaultyServer) -> None:
    """A read whose time a further connection has used up does not break the first connection."""
    server.choose_connection = lambda number: None if number == 1 else "no greeting"
    server.choose_reply = lambda number: "held" if number == 1 else None
    with opened(server, Deadlines(1, 1, 1)) as file, ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, file)
        while not server.struck["held"]:
            pass
        second = pool.submit(read, file)  # makes another connection, because the first one is busy
        while not server.struck["no greeting"]:
            pass
        server.released.set()
        assert first.result() == server.content[:LENGTH]
        assert isinstance(second.exception(), RemoteError)
        connections = server.struck["no greeting"]
        assert read(file) == server.content[:LENGTH]
        assert server.struck["no greeting"] == connections


async def test_a_cancelled_read_leaves_the_others_alone(server: FaultyServer) -> None:
    """A task that is cancelled while it receives for all hands that over to one that waits."""
    server.choose_reply = lambda number: "held" if number == 1 else None
    results: list[bytes] = []
    with opened(server, PATIENT) as file:

        async def collect(offset: int) -> None:
            results.append(bytes(await file.pread(offset, LENGTH)))

        with trio.fail_after(PATIENT.attempt_seconds / 2):
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as inner:
                    inner.start_soon(file.pread, 0, LENGTH)  # receives for all
                    await trio.testing.wait_all_tasks_blocked()
                    for offset in (100, 200):
                        nursery.start_soon(collect, offset)
                    await trio.testing.wait_all_tasks_blocked()
                    inner.cancel_scope.cancel()
                server.released.set()
    assert server.struck["held"] == 1
    assert sorted(results) == sorted(server.content[at : at + LENGTH] for at in (100, 200))


@pytest.mark.parametrize("reader", READERS)
def test_close_ends_a_read_that_waits(server: FaultyServer, reader: str) -> None:
    """A read that waits for a stuck server fails as soon as the file is closed."""
    server.choose_reply = lambda _number: "stall"
    failures: list[Exception] = []

    def wait() -> None:
        try:
            READERS[reader](file)
        except HostError as error:
            failures.append(error)

    with opened(server, PATIENT) as file:
        thread = threading.Thread(target=wait)
        thread.start()
        while not server.struck["stall"]:
            time.sleep(0.01)
        file.close()
        thread.join(10)
        assert not thread.is_alive()
    assert len(failures) == 1


def fail_until_closed(
    file: NbdFile, reader: str, has_struck: Callable[[], object], *, count: int = 1
) -> None:
    """Read in threads; stop the file when ``has_struck`` is true, and expect that all reads end."""
    failures: list[Exception] = []

    def wait() -> None:
        try:
            READERS[reader](file)
        except HostError as error:
            failures.append(error)

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    while not has_struck():
        time.sleep(0.01)
    file.stop_fetching()
    for thread in threads:
        thread.join(PATIENT.attempt_seconds / 2)
        assert not thread.is_alive()
    assert len(failures) == count


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", ["no greeting", "stall in the handshake"])
def test_stop_ends_a_handshake(server: FaultyServer, fault: str, reader: str) -> None:
    """Reads whose new connections wait in the handshake fail as soon as fetching is stopped."""
    server.choose_connection = lambda number: None if number == 1 else fault
    with opened(server, PATIENT) as file:
        server.break_connections()
        count = 6 if reader == "thread" else 1  # a file belongs to one event loop
        fail_until_closed(file, reader, lambda: server.struck[fault], count=count)
    assert server.struck[fault] <= MAX_CONNECTIONS


class Connector:
    """Connects to a server at first, and later does what a test asks for."""

    def __init__(self, server: FaultyServer) -> None:
        """Connect to ``server``."""
        self._connect = server.connect
        self.count = 0
        self.later: Callable[[], socket.socket] = server.connect

    def __call__(self) -> socket.socket:
        """Return a connected socket."""
        self.count += 1
        return self._connect() if self.count == 1 else self.later()


@BEGINS
@ENDS
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("where", ["socket", "handshake"])
def test_a_connection_has_no_more_time_than_the_read(
    server: FaultyServer, where: str, reader: str
) -> None:
    """A read ends in time if a server accepts no connection, or sends no greeting.

    All reads that wait for the connection end, and the reads after them work if the server does.
    """
    limits = Deadlines(connect_seconds=100, attempt_seconds=100, total_seconds=0.5)
    server.choose_connection = lambda number: None if number == 1 else "stall in the handshake"
    connector = Connector(server)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        if where == "socket":
            connector.later = partial(socket.create_connection, address, 100)
        # The queue of the listener has space for one connection.
        with socket.create_connection(address), ThreadPoolExecutor(3) as pool:
            file = open_nbd(connector, "", "x", limits)
            server.break_connections()
            count = 3 if reader == "thread" else 1  # a file belongs to one event loop
            start = time.monotonic()
            reads = [pool.submit(READERS[reader], file) for _ in range(count)]
            for failed in reads:
                error = failed.exception()
                assert isinstance(error, RemoteError)
                assert "in time" in str(error)
            assert time.monotonic() - start < MAX_SECONDS
            assert connector.count > 1
    server.choose_connection = lambda _number: None
    connector.later = server.connect
    try:
        assert READERS[reader](file) == server.content[:LENGTH]
    finally:
        file.close()


@pytest.mark.parametrize("reader", READERS)
def test_stop_ends_the_wait_for_a_socket(server: FaultyServer, reader: str) -> None:
    """A read fails as soon as fetching is stopped, also while connect(2) waits.

    A socket that comes later is closed.
    """
    released = threading.Event()
    mine, other = socket.socketpair()
    connector = Connector(server)

    def connect() -> socket.socket:
        released.wait()
        return mine

    connector.later = connect
    file = open_nbd(connector, "", "x", PATIENT)
    try:
        server.break_connections()
        fail_until_closed(file, reader, lambda: connector.count > 1)
    finally:
        released.set()
        file.close()
    with other:
        other.settimeout(20)
        assert other.recv(1) == b""


@pytest.mark.parametrize("reader", READERS)
def test_stop_ends_the_pause_between_attempts(
    server: FaultyServer, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that waits before its next attempt fails as soon as fetching is stopped."""
    monkeypatch.setattr(attempts, "_FIRST_PAUSE_SECONDS", PATIENT.attempt_seconds)
    monkeypatch.setattr(attempts, "_MAX_PAUSE_SECONDS", 1.5 * PATIENT.attempt_seconds)
    connector = Connector(server)

    def fail() -> socket.socket:
        raise ConnectionRefusedError

    connector.later = fail
    file = open_nbd(connector, "", "x", PATIENT)
    server.break_connections()
    fail_until_closed(file, reader, lambda: connector.count > 1)


async def holes(file: NbdFile) -> list[tuple[int, int]]:
    """Return the holes of a file, by a search from the beginning to the end."""
    found, offset = [], 0
    while (start := await file.next_hole(offset)) is not None and start < file.size():
        end = await file.next_data(start)
        offset = file.size() if end is None else end
        found.append((start, offset))
    return found


@pytest.mark.parametrize("zeros", [0, 1, 4096])
def test_tiny_extents_do_not_make_a_search_endless(server: FaultyServer, zeros: int) -> None:
    """A server that answers with one extent of a byte gets limited time; the rest is data.

    In each range of 8192 bytes the first ``zeros`` are reported as zeros.
    """
    asked: list[int] = []

    def choose(offset: int, _length: int) -> list[tuple[int, int]]:
        asked.append(offset)
        return [(1, messages.STATE_ZERO if offset % 8192 < zeros else 0)]

    server.choose_extents = choose
    with opened(server, Deadlines(1, 10, 0.3)) as file:
        start = time.monotonic()
        found = trio.run(holes, file)
        assert time.monotonic() - start < MAX_SECONDS
        count = len(asked)
        assert 1 < count < file.size() // 4
        assert all(begin % 8192 + end - begin <= zeros for begin, end in found)
        assert trio.run(holes, file) == []
        assert len(asked) == count


def test_small_extents_are_found_within_the_time(server: FaultyServer) -> None:
    """A server that answers with one extent of 64 KiB is asked for all of them."""
    step = 64 << 10

    def choose(offset: int, _length: int) -> list[tuple[int, int]]:
        return [(step, messages.STATE_ZERO * (offset // step % 2))]

    server.choose_extents = choose
    with opened(server, PATIENT) as file:
        expected = [(at, at + step) for at in range(step, file.size(), 2 * step)]
        assert trio.run(holes, file) == expected


@pytest.mark.parametrize(
    ("error", "failures", "is_final"),
    [(12, 1, False), (12, 7, False), (12, 8, True), (22, 1, True), (95, 1, True)],
)
def test_an_error_instead_of_extents_is_about_one_search(
    server: FaultyServer, error: int, failures: int, *, is_final: bool
) -> None:
    """After an error a short range counts as data; a server without extents is not asked again."""
    server.content = bytes(16 << 20)
    asked: list[int] = []

    def choose(offset: int, length: int) -> list[tuple[int, int]] | int:
        asked.append(offset)
        return error if len(asked) <= failures else [(length, messages.STATE_ZERO)]

    server.choose_extents = choose
    with opened(server, PATIENT) as file:
        size = file.size()
        begin = failures << 20
        assert trio.run(file.next_data, 0) == 0
        assert len(asked) == 1
        assert trio.run(file.next_hole, 0) == (size if is_final else begin)
        assert len(asked) == failures + (not is_final)
        assert trio.run(holes, file) == ([] if is_final else [(0, size)])


def test_time_of_searches_from_the_middle_does_not_add_up() -> None:
    """A request for a lower offset begins a new search, one for a higher offset does not."""
    steps = SmallSteps(1.0)

    def is_too_slow(offset: int) -> bool:
        request = BlockStatus(offset, 1 << 30)
        request.extents = [(512, 0)]
        return steps.add_reply(request, 0.4)

    assert not any(map(is_too_slow, [8192, 9216, 8192, 9216, 8192, 9216]))
    assert is_too_slow(10240)


def test_a_server_whose_queue_of_connections_is_full_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening waits while the queue of a Unix socket is full, until the server accepts."""
    sleep = time.sleep
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        if not pauses:
            busy.start()
        pauses.append(seconds)
        sleep(seconds)

    url = f"nbd+unix:///?socket={tmp_path / 'faulty'}"
    with serving_nothing(tmp_path) as busy:
        monkeypatch.setattr(time, "sleep", pause)
        file = open_export(parse_address(url), PATIENT)
        try:
            assert read(file) == busy.content
        finally:
            file.close()
    assert pauses


def test_a_queue_of_connections_that_stays_full_is_an_error_in_time(tmp_path: Path) -> None:
    """Opening fails after the time for connecting if the queue of a Unix socket stays full."""
    url = f"nbd+unix:///?socket={tmp_path / 'faulty'}"
    deadlines = Deadlines(connect_seconds=0.05, attempt_seconds=20, total_seconds=40)
    with (
        serving_nothing(tmp_path),
        pytest.raises(RemoteError, match=r"faulty: found no connection in time$"),
    ):
        open_export(parse_address(url), deadlines)


class Readers:
    """Reads of ranges, each of which must give the right bytes or fail."""

    def __init__(self, file: NbdFile, content: bytes) -> None:
        self._file = file
        self._content = content
        self.right = 0

    def read(self, offset: int, length: int) -> None:
        """Read in this thread."""
        with suppress(HostError):
            self._compare(offset, read(self._file, offset, length))

    async def read_in_task(self, offset: int, length: int) -> None:
        """Read in this task."""
        with suppress(HostError):
            self._compare(offset, bytes(await self._file.pread(offset, length)))

    async def read_in_tasks(self, ranges: list[tuple[int, int]]) -> None:
        """Read in tasks, twelve at a time."""
        for at in range(0, len(ranges), 12):
            async with trio.open_nursery() as nursery:
                for each in ranges[at : at + 12]:
                    nursery.start_soon(self.read_in_task, *each)

    def _compare(self, offset: int, found: bytes) -> None:
        assert found == self._content[offset : offset + len(found)]
        self.right += 1


@BEGINS
@ENDS
@pytest.mark.parametrize("seed", range(4))
def test_random_mistakes_give_right_bytes_or_errors(server: FaultyServer, seed: int) -> None:
    """Tasks and threads that read concurrently get right bytes or errors, in bounded time."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def sometimes(faults: tuple[str, ...]) -> Callable[[int], str | None]:
        def choose(number: int) -> str | None:
            with lock:
                return draw.choice(faults) if number > 1 and draw.random() < 0.2 else None

        return choose

    ranges = [(draw.randrange(900_000), draw.choice([1, 512, 40_000])) for _ in range(120)]
    with opened(server) as file:
        server.choose_reply = sometimes((*OTHER_FAULTS, "error", "late"))
        server.choose_connection = sometimes(CONNECTION_FAULTS)
        readers = Readers(file, server.content)
        with ThreadPoolExecutor(5) as pool:
            futures = [pool.submit(trio.run, readers.read_in_tasks, ranges[:60])]
            futures += [pool.submit(readers.read, *each) for each in ranges[60:]]
            for future in futures:
                future.result(100)
        assert readers.right > 20
        assert sum(server.struck.values()) > 5
        server.choose_reply = lambda _number: "reset"  # so that an outage is logged in each case
        with pytest.raises(RemoteError):
            read(file)
        server.choose_reply = server.choose_connection = lambda _number: None
        assert read(file) == server.content[:LENGTH]
