"""Responses in parts: each part arrives by itself, and what has arrived is not requested again."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.remote import deadline
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import AttemptError, ClientOptions
from qedfuse.remote.fetcher import Fetcher
from qedfuse.remote.object import RemoteObject, make_client, open_object
from qedfuse.remote.storeclient import _cut
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.remotes import PATIENT, HeldObject, fetching_threads, opened, read, some_bytes
from tests.support.webserver import serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer
    from tests.support.webserver import WebServer

PART = 100_000
LENGTHS = [PART] * 3 + [5000]
CONTENT = some_bytes(2)[: sum(LENGTHS)]


@pytest.fixture
def source_of(url_of: Callable[[WebServer], str]) -> Callable[[WebServer], RemoteObject]:
    """Return a function that opens the object of a server with one of the clients."""

    def open_it(server: WebServer) -> RemoteObject:
        address = parse_address(url_of(server))
        options = ClientOptions(attempt_seconds=PATIENT.attempt_seconds)
        source = open_object(address, make_client(address, options), PATIENT)
        server.requests.clear()
        return source

    return open_it


def test_one_request_for_all_parts(source_of: Callable[[WebServer], RemoteObject]) -> None:
    """Each part has its length, and the server gets one request."""
    with serving(CONTENT) as server:
        parts: list[bytes] = []
        source_of(server).get_parts(0, LENGTHS, lambda part: parts.append(bytes(part)))
        assert [len(part) for part in parts] == LENGTHS
        assert b"".join(parts) == CONTENT
        assert server.requests == [(0, len(CONTENT) - 1)]


def test_what_has_arrived_is_not_requested_again(
    source_of: Callable[[WebServer], RemoteObject],
) -> None:
    """After a response that breaks off, the next request begins with the first missing part."""
    with serving(CONTENT) as server:
        source = source_of(server)
        server.faults = ["half"]
        parts: list[bytes] = []
        source.get_parts(0, LENGTHS, lambda part: parts.append(bytes(part)))
        assert b"".join(parts) == CONTENT
        assert server.struck["half"] == 1
        assert server.requests[-1] == (PART, len(CONTENT) - 1)


@pytest.mark.parametrize("obeys", [True, False])
def test_no_part_of_another_version_arrives(
    source_of: Callable[[WebServer], RemoteObject],
    obeys: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """After the object is replaced no part arrives, also if the server ignores the condition."""
    with serving(CONTENT) as server:
        source = source_of(server)
        server.obeys_conditions = obeys
        server.content, server.etag = CONTENT[::-1], '"two"'
        parts: list[Buffer] = []
        with pytest.raises(ObjectChangedError):
            source.get_parts(0, LENGTHS, parts.append)
        assert not parts
        assert len(server.requests) == (0 if obeys else 1)


def test_a_part_arrives_before_the_end_of_the_response(
    source_of: Callable[[WebServer], RemoteObject],
) -> None:
    """While the server sends nothing more, the parts that it has sent are delivered."""
    with serving(CONTENT) as server:
        source = source_of(server)
        server.faults = ["stall"]
        first = threading.Event()
        parts: list[bytes] = []

        def deliver(part: Buffer) -> None:
            parts.append(bytes(part))
            first.set()

        thread = threading.Thread(target=source.get_parts, args=(0, LENGTHS, deliver))
        thread.start()
        try:
            assert first.wait(PATIENT.attempt_seconds / 2)
            assert len(parts) == 1
            assert thread.is_alive()
        finally:
            server.ended.set()
            thread.join()
        assert b"".join(parts) == CONTENT


def test_each_part_has_the_time_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response may take longer than an attempt, if each part arrives in time."""
    passed = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)
    monkeypatch.setattr(deadline, "time", clock)
    with serving(CONTENT) as server:
        address = parse_address(server.url)
        source = open_object(address, make_client(address, ClientOptions()), PATIENT)
        server.requests.clear()
        parts: list[bytes] = []

        def deliver(part: Buffer) -> None:
            nonlocal passed
            parts.append(bytes(part))
            passed += 0.9 * PATIENT.attempt_seconds

        source.get_parts(0, LENGTHS, deliver)
        assert passed > PATIENT.attempt_seconds
        assert b"".join(parts) == CONTENT
        assert server.requests == [(0, len(CONTENT) - 1)]


def test_a_part_is_received_by_one_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel waits for all bytes of a long part, so the thread takes the GIL once."""
    lengths: list[int] = []
    read_all = deadline._TimedSocket._read_all

    def counted(self: deadline._TimedSocket, buffer: memoryview, seconds: float) -> int:
        lengths.append(len(memoryview(buffer)))
        return read_all(self, buffer, seconds)

    monkeypatch.setattr(deadline._TimedSocket, "_read_all", counted)
    with serving(CONTENT) as server:
        address = parse_address(server.url)
        source = open_object(address, make_client(address, ClientOptions()), PATIENT)
        source.get_parts(0, LENGTHS, lambda _: None)
    assert len(lengths) == 3  # the last part is short
    assert sum(lengths) > 2.8 * PART


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1] * 10, [4, 4, 2], [9, 1]])
def test_blocks_are_cut_into_parts(sizes: list[int]) -> None:
    """The blocks of a response need not have the lengths of the parts."""
    content = bytes(range(10))
    at, blocks = 0, []
    for size in sizes:
        blocks.append(memoryview(content)[at : at + size])
        at += size
    assert [bytes(part) for part in _cut(iter(blocks), [4, 4, 2])] == [
        content[:4],
        content[4:8],
        content[8:],
    ]


@pytest.mark.parametrize(
    ("sizes", "found"), [([4, 5], "found 9 bytes"), ([], "found 0"), ([4, 7], "found more than 10")]
)
def test_blocks_of_another_length(sizes: list[int], found: str) -> None:
    """A response that is shorter or longer than its parts is an error."""
    blocks = (memoryview(bytes(size)) for size in sizes)
    with pytest.raises(AttemptError, match=f"{found}.*, expected 10$"):
        list(_cut(blocks, [4, 4, 2]))


@pytest.mark.expect_log("broken on purpose")
def test_a_flight_ends_when_its_part_has_arrived() -> None:
    """Readers of a long request are answered one by one, and a failure fails only the rest."""
    source = HeldObject(some_bytes(160))
    fetcher = Fetcher(source, None)  # type: ignore[arg-type]
    try:
        with fetcher._lock:
            flights = fetcher._begin(0, 15, is_wanted=False, is_long=True)
            source.held = {4}
            source.errors = {9: RemoteError("broken on purpose")}
        assert [flight.continues for flight in flights] == [False, True, True, True]
        flights[0].wait_blocking()
        assert not flights[1]._ended.is_set()
        source.release()
        flights[1].wait_blocking()
        for flight in flights[2:]:
            with pytest.raises(RemoteError, match="broken on purpose"):
                flight.wait_blocking()
        assert source.units() == [list(range(16))]
        assert (fetcher.requests, fetcher.awaited_requests) == (1, 0)
        assert fetcher.fetched_bytes == 8 << 18
    finally:
        fetcher.close()


def test_close_ends_a_response(source_of: Callable[[WebServer], RemoteObject]) -> None:
    """After a close during a response, no further part is read, and no attempt begins."""
    with serving(CONTENT) as server:
        source = source_of(server)
        parts: list[bytes] = []

        def deliver(part: Buffer) -> None:
            parts.append(bytes(part))
            source.close()

        for _ in range(2):
            with pytest.raises(RemoteError, match="found the file closed, expected it open"):
                source.get_parts(0, LENGTHS, deliver)
        assert parts == [CONTENT[:PART]]
        assert len(server.requests) == 1


def test_close_before_the_credentials_are_tried_again(
    source_of: Callable[[WebServer], RemoteObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a close, a refused attempt is not repeated with the renewed credentials."""
    with serving(CONTENT) as server:
        source = source_of(server)
        server.faults = ["status 403"]
        monkeypatch.setattr(source._client, "renew", source.close)
        with pytest.raises(RemoteError, match="found the file closed, expected it open"):
            source.get(0, PART)
        assert server.struck["status 403"] == 1
        assert not server.requests


def test_close_between_the_requests_of_a_prefetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that has several requests to send ends after the one during which it was closed."""
    content = some_bytes(16)
    with serving(content) as server:
        with opened(server.url, tmp_path) as file:
            for unit in (11, 7, 3):  # backwards, so that nothing is read ahead
                assert read(file, unit * UNIT_BYTES, UNIT_BYTES)
        with opened(server.url, tmp_path) as file:
            server.requests.clear()
            get_parts, sent = RemoteObject.get_parts, []

            def close_after(*arguments: object, **options: object) -> None:
                sent.append(arguments[1])
                get_parts(*arguments, **options)  # type: ignore[arg-type]
                file.close()

            monkeypatch.setattr(RemoteObject, "get_parts", close_after)
            with file.fetcher._lock:
                flights = file.fetcher._begin(0, 15, is_wanted=False, is_long=True)
            assert len(flights) == 4
            wait_until(lambda: sent and not fetching_threads())
            flights[0].wait_blocking()
            for flight in flights[1:]:
                with pytest.raises(RemoteError, match="closed"):
                    flight.wait_blocking()
        assert server.requests == [(0, 3 * UNIT_BYTES - 1)]
