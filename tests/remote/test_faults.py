"""Faults of a web server or a store: right bytes, or an error for that range in bounded time."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Final, get_args

import pytest
import trio

from qedfuse.disk.lookup.imageopening import open_url
from qedfuse.errors import ObjectChangedError, RemoteError, UsageError
from qedfuse.remote import recentfailures
from qedfuse.remote.address import parse_address, parse_prefix
from qedfuse.remote.client import ClientOptions
from qedfuse.remote.object import make_client, open_object
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.remote.webclient import WebClient
from tests.support.remotes import DEADLINES, MAX_SECONDS, PATIENT, opened, read, some_bytes
from tests.support.webserver import Fault, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.support.webserver import WebServer

ALL: Final[tuple[Fault, ...]] = get_args(Fault)
CONTENT: Final = some_bytes(3.5)

_REPEATED: Final = {
    *(
        "half",
        "stall",
        "trickle",
        "slow header",
        "status 503",
        "status 500",
        "status 429",
        "status 409",
    ),
    *("status 403", "other range", "reset", "silence", "garbage", "endless", "redirect"),
    *("longer", "chunked", "chunked longer"),
}
REPEATED: Final = {"http": _REPEATED, "s3": _REPEATED | {"redirect elsewhere", "gzip"}}
"""For each scheme, faults after which the bytes are right: another attempt is made, or a
redirection followed."""
CHANGED: Final = {"status 404", "status 416", "other etag", "no etag", "other size"}
"""Faults that look like another version of the object."""
HARMLESS: Final = {"http": {"redirect", "chunked"}, "s3": {"redirect", "chunked", "gzip"}}
"""What is no fault in the end, however often it happens.  A store keeps the encoding of an object
as a note of its user, and serves the bytes as they were stored."""
IN_RANGES: Final = {
    *("half", "stall", "trickle", "other range", "other etag", "no etag", "other size"),
}
"""Faults of which the answer for the first byte shows nothing."""
IN_BODIES: Final = {
    *("half", "stall", "trickle", "other range", "longer", "chunked", "chunked longer"),
    *("no range", "gzip"),
}
"""Faults of which the answer to a HEAD request, with which a store is opened, shows nothing."""
ASKED_AGAIN: Final = {"status 404", "status 418"}
"""Faults of a HEAD request after which a GET request is sent."""

OUTAGE: Final = "what is not in the cache cannot be read"
BACK: Final = "answers again"
logs_outage = pytest.mark.expect_log(OUTAGE)
logs_end = pytest.mark.expect_log(BACK)


def cases(
    faults: Callable[[str], Iterable[str]], *marks: pytest.MarkDecorator
) -> pytest.MarkDecorator:
    """Return a decorator with each scheme and each of its faults, with marks."""
    return pytest.mark.parametrize(
        ("scheme", "fault"),
        [
            pytest.param(scheme, fault, marks=marks)
            for scheme in ("http", "s3")
            for fault in sorted(faults(scheme))
        ],
    )


@cases(lambda scheme: REPEATED[scheme])
def test_once_is_repeated(fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path) -> None:
    """After a fault that may pass, the attempt is repeated and the bytes are right."""
    deadlines = replace(DEADLINES, total_seconds=20.0)
    with serving(CONTENT) as server, opened(url_of(server), tmp_path, deadlines=deadlines) as file:
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        server.faults = [fault]
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert server.struck[fault] == 1


@cases(lambda scheme: set(ALL) - REPEATED[scheme], logs_outage, logs_end)
def test_once_is_an_error_of_one_range(
    fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path
) -> None:
    """After a fault that another attempt would meet, the read fails and the next one is right."""
    with serving(CONTENT) as server, opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        server.faults = [fault]
        kind = ObjectChangedError if fault in CHANGED else RemoteError
        with pytest.raises(kind) as caught:
            read(file, 0, 4096)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert server.struck[fault] >= 1
        server.faults = []
        assert read(file, 0, len(CONTENT)) == CONTENT


@cases(lambda scheme: set(ALL) - HARMLESS[scheme], logs_outage, logs_end)
def test_always(fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path) -> None:
    """While a fault lasts, what is cached is read, the rest fails in time; then all is read."""
    assert_endured(fault, url_of, tmp_path)


# The client of a scheme finds a fault, and does not know about the cache.  So one scheme, and one
# fault of each kind, show what happens without a cache: no answer, an answer after which the
# attempt is repeated, one after which it is not, and one of another version.
@logs_outage
@logs_end
@pytest.mark.parametrize("scheme", ["http"])
@pytest.mark.parametrize("fault", ["silence", "status 503", "status 418", "other etag"])
def test_always_without_a_cache(fault: Fault, url_of: Callable[[WebServer], str]) -> None:
    """Without a cache on the disk, the units in memory are read while a fault lasts."""
    assert_endured(fault, url_of, None)


def assert_endured(fault: Fault, url_of: Callable[[WebServer], str], cache: Path | None) -> None:
    """Assert that a file can be read as far as it was read before, while a fault lasts."""
    with serving(CONTENT) as server, opened(url_of(server), cache, deadlines=DEADLINES) as file:
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
        server.always = fault
        begin = time.monotonic()
        with pytest.raises(RemoteError):
            read(file, 2 * UNIT_BYTES, UNIT_BYTES)
        assert time.monotonic() - begin < MAX_SECONDS
        assert server.struck[fault] >= 1
        assert read(file, 100, 1000) == CONTENT[100:1100]
        server.always, server.faults = None, []
        assert read(file, 0, len(CONTENT)) == CONTENT


@logs_outage
@logs_end
@pytest.mark.parametrize("fault", ["silence", "stall", "status 503", "reset"])
def test_a_failed_read_that_is_repeated_waits_once(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read again of what has just failed does not wait for the whole time once more.

    It is right as soon as the server answers.
    """
    monkeypatch.setattr(recentfailures, "_RECENT_SECONDS", 600.0)
    monkeypatch.setattr(recentfailures, "_MAX_REPEATED_SECONDS", 600.0)
    deadlines = Deadlines(connect_seconds=1.0, attempt_seconds=0.5, total_seconds=4.0)
    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=deadlines) as file:
        server.always = fault
        attempts = []
        for _ in range(2):
            before = server.struck[fault]
            with pytest.raises(RemoteError):
                read(file, 2 * UNIT_BYTES, 4096)
            attempts.append(server.struck[fault] - before)
        # One lasts half a second, or those that fail immediately are repeated for half a second.
        assert attempts[1] < attempts[0]
        assert attempts[1] == 1 or fault not in {"silence", "stall"}
        server.always = None
        assert read(file, 2 * UNIT_BYTES, 4096) == CONTENT[2 * UNIT_BYTES :][:4096]


@cases(lambda scheme: set(ALL) - (IN_BODIES if scheme == "s3" else set()))
def test_at_opening(
    scheme: str, fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path
) -> None:
    """A fault at opening leads to an error in bounded time, or to a file with the right bytes."""
    with serving(CONTENT) as server:
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        server.heads_fail = True
        server.faults = [fault]
        message = ""
        begin = time.monotonic()
        try:
            with opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
                server.faults = []
                passes = IN_RANGES | (ASKED_AGAIN if scheme == "s3" else set())
                assert fault in REPEATED[scheme] | passes
                if fault in ASKED_AGAIN or fault not in CHANGED:
                    assert read(file, 0, len(CONTENT)) == CONTENT
        except RemoteError as error:
            message = str(error)
        assert "\n" not in message
        assert time.monotonic() - begin < MAX_SECONDS
        assert server.struck[fault] >= 1


@logs_outage
@pytest.mark.parametrize("scheme", ["s3"])
@pytest.mark.parametrize("fault", ["other etag", "other size"])
def test_opening_finds_another_version(
    fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path
) -> None:
    """If a HEAD response describes another version, no bytes of the present one are returned."""
    with serving(CONTENT) as server:
        server.heads_fail, server.faults = True, [fault]
        with opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
            assert server.struck[fault] == 1
            with pytest.raises(ObjectChangedError):
                read(file, 0, 4096)


@cases(
    lambda scheme: (
        set(ALL) - HARMLESS[scheme] - IN_RANGES - (IN_BODIES if scheme == "s3" else set())
    )
)
def test_always_at_opening(
    fault: Fault, url_of: Callable[[WebServer], str], tmp_path: Path
) -> None:
    """A server with a lasting fault is not opened, or serves only errors; in bounded time."""
    with serving(CONTENT) as server:
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        server.heads_fail = True
        server.always = fault
        begin = time.monotonic()
        with pytest.raises(RemoteError), opened(url_of(server), tmp_path, deadlines=DEADLINES):
            pass
        assert time.monotonic() - begin < MAX_SECONDS
        assert server.struck[fault] >= 1


def test_attempts_are_counted(tmp_path: Path) -> None:
    """A server with a lasting fault is asked a bounded number of times for a read."""
    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        server.always = "status 418"
        with pytest.raises(RemoteError, match="418"):
            read(file, 0, 4096)
        assert server.struck["status 418"] == 1
        server.always = "status 404"
        with pytest.raises(RemoteError, match="no such object"):
            read(file, 0, 4096)
        assert server.struck["status 404"] == 1
        server.always = "status 503"
        with pytest.raises(RemoteError, match="503"):
            read(file, 0, 4096)
        assert 2 <= server.struck["status 503"] <= 12


test_attempts_are_counted = logs_outage(test_attempts_are_counted)


@logs_outage
def test_credentials_are_renewed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal the credentials are read again, once for each read."""
    with serving(CONTENT) as server:
        address = parse_address(server.url)
        client = make_client(address, ClientOptions(attempt_seconds=1.0))
        source = open_object(address, client, DEADLINES)
        renewals = Counter[str]()
        monkeypatch.setattr(WebClient, "renew", lambda _: renewals.update(["renew"]))
        server.faults = ["status 403"]
        assert bytes(source.get(0, 100)) == CONTENT[:100]
        assert renewals.total() == 1
        server.faults = ["status 403", "status 403"]
        with pytest.raises(RemoteError, match="refused"):
            source.get(0, 100)
        assert renewals.total() == 2
        assert server.struck["status 403"] == 3
        with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
            server.always = "status 403"
            with pytest.raises(RemoteError, match="refused") as caught:
                read(file, 0, 100)
            assert caught.value.errno == 13
            assert server.struck["status 403"] == 5


def test_redirection_to_an_allowed_prefix(tmp_path: Path) -> None:
    """A redirection to another server is followed below a prefix that the user allows."""
    with serving(CONTENT) as other, serving(b"") as server:
        server.always = "redirect elsewhere"
        server.elsewhere = other.url
        allowed = other.url.rpartition("/")[0]
        options = RemoteOptions(
            cache_directory=str(tmp_path), deadlines=DEADLINES, allowed=(parse_prefix(allowed),)
        )
        file = open_remote(parse_address(server.url), options)
        try:
            assert read(file, 0, len(CONTENT)) == CONTENT
        finally:
            file.close()
        # What the redirection leads to is remembered.
        assert server.struck["redirect elsewhere"] == 1
        options = RemoteOptions(
            cache_directory=str(tmp_path),
            deadlines=DEADLINES,
            allowed=(parse_prefix(allowed[:-1]),),
        )
        asked = len(other.requests)
        with pytest.raises(RemoteError, match="redirection"):
            open_remote(parse_address(server.url + "2"), options)
        assert len(other.requests) == asked


def test_remembered_redirection_that_fails_is_forgotten(tmp_path: Path) -> None:
    """When the target of a redirection is gone, the next attempt asks the first server again."""
    with serving(CONTENT) as server:
        with serving(CONTENT) as gone, serving(CONTENT) as missing:
            server.always = "redirect elsewhere"
            server.elsewhere = gone.url
            allowed = tuple(parse_prefix(other.url.rpartition("/")[0]) for other in (gone, missing))
            options = RemoteOptions(
                cache_directory=str(tmp_path), deadlines=DEADLINES, allowed=allowed
            )
            file = open_remote(parse_address(server.url), options)
            assert read(file, 0, 10) == CONTENT[:10]
            gone.always = "status 404"
            server.elsewhere = missing.url
            assert read(file, UNIT_BYTES, 10) == CONTENT[UNIT_BYTES:][:10]
            assert gone.struck["status 404"] >= 1
            server.always = None
        try:
            assert read(file, 0, len(CONTENT)) == CONTENT
        finally:
            file.close()


@pytest.mark.parametrize("scheme", ["s3"])
def test_redirection_by_a_store(url_of: Callable[[WebServer], str], tmp_path: Path) -> None:
    """A store may redirect anywhere; of the credentials, a session token reaches the target.

    The signature does not.
    """
    with serving(CONTENT) as other, serving(b"") as server:
        server.always, server.heads_fail = "redirect elsewhere", True
        server.elsewhere = other.url
        with opened(url_of(server), tmp_path, deadlines=PATIENT) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert all("AWS4-HMAC-SHA256" in found for found in server.authorizations)
        assert set(other.authorizations) == {""}
        assert len(other.requests) >= 1
        assert {found.get("x-amz-security-token") for found in other.headers} == {"token"}


@logs_outage
@logs_end
@pytest.mark.parametrize("scheme", ["s3"])
@pytest.mark.parametrize("obeys", [True, False])
def test_redirection_by_a_store_to_another_version(
    obeys: bool,  # noqa: FBT001  a parameter of the test
    url_of: Callable[[WebServer], str],
    tmp_path: Path,
) -> None:
    """What has another ETag at the target of a store's redirection is never returned."""
    with (
        serving(CONTENT[::-1]) as other,
        serving(CONTENT) as server,
        opened(url_of(server), tmp_path, deadlines=PATIENT) as file,
    ):
        other.etag, other.obeys_conditions = '"two"', obeys
        server.always, server.elsewhere = "redirect elsewhere", other.url
        with pytest.raises(ObjectChangedError):
            read(file, 0, 4096)
        assert other.authorizations == [""]
        server.always = None
        assert read(file, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    "location",
    [
        "",
        "//",
        "http://[::1/x",
        "http://user@127.0.0.1/x",
        "s3://b/x",
        "file:///etc/passwd",
        "/a%2f",
    ],
)
def test_strange_redirections(location: str, tmp_path: Path) -> None:
    """A redirection that leads to no URL of a web server is refused with one line."""
    with serving(CONTENT) as server:
        server.always = "redirect elsewhere"
        server.elsewhere = location
        with (
            pytest.raises(RemoteError) as caught,
            opened(server.url, tmp_path, deadlines=DEADLINES),
        ):
            pass
        assert "\n" not in str(caught.value)
        assert server.struck["redirect elsewhere"] >= 1


@pytest.mark.parametrize("count", [5, 6])
def test_number_of_redirections(count: int, tmp_path: Path) -> None:
    """Five redirections in a row are followed, and six are refused."""
    with serving(CONTENT) as server:
        server.elsewhere = server.url
        server.faults += ["redirect elsewhere"] * count
        if count == 5:
            with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
                assert read(file, 0, 100) == CONTENT[:100]
        else:
            with (
                pytest.raises(RemoteError, match="found more than 5 redirections"),
                opened(server.url, tmp_path, deadlines=DEADLINES),
            ):
                pass
        assert server.struck["redirect elsewhere"] == count


@logs_outage
@pytest.mark.parametrize("obeys", [True, False])
def test_content_replaced(
    obeys: bool,  # noqa: FBT001  a parameter of the test
    url_of: Callable[[WebServer], str],
    tmp_path: Path,
) -> None:
    """When the object is replaced, cached units go on and the rest is ESTALE each time."""
    with serving(CONTENT) as server, opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, 100) == CONTENT[:100]
        server.obeys_conditions = obeys
        server.content, server.etag = some_bytes(3.5, seed=2), '"two"'
        for _ in range(2):
            with pytest.raises(ObjectChangedError) as caught:
                read(file, 2 * UNIT_BYTES, 100)
            assert caught.value.errno == 116
            assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]


@logs_outage
@pytest.mark.parametrize(
    ("scheme", "etag"),
    [("http", ""), ("http", 'W/"weak"'), ("http", '"bad tag\x7f"'), ("s3", ""), ("s3", 'W/"weak"')],
)
@pytest.mark.parametrize("obeys", [True, False])
def test_only_a_time(
    obeys: bool,  # noqa: FBT001  a parameter of the test
    etag: str,
    url_of: Callable[[WebServer], str],
    tmp_path: Path,
) -> None:
    """Without a strong tag, the time of the last change shows that the object was replaced."""
    with serving(CONTENT) as server:
        server.etag = etag
        server.obeys_conditions = obeys
        with opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, 100) == CONTENT[:100]
            server.content = some_bytes(3.5, seed=2)
            server.modified = 1_000_000_001.0
            with pytest.raises(ObjectChangedError):
                read(file, 2 * UNIT_BYTES, 100)
            assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]


def test_no_validator(tmp_path: Path) -> None:
    """An object without a validator is refused; if that is allowed, nothing of it is cached."""
    with serving(CONTENT) as server:
        server.etag, server.modified = 'W/"weak"', None
        with (
            pytest.raises(RemoteError, match="allow_unpinned"),
            opened(server.url, tmp_path, deadlines=DEADLINES),
        ):
            pass
        with opened(server.url, tmp_path, allow_unpinned=True, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"CACHEDIR.TAG"}
        server.content = some_bytes(3.5, seed=2)
        with opened(server.url, tmp_path, allow_unpinned=True, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == server.content


def test_empty_object(url_of: Callable[[WebServer], str], tmp_path: Path) -> None:
    """An object without content is a file without content."""
    with serving(b"") as server, opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
        assert file.size() == 0
        assert read(file, 0, 10) == b""
        assert not file.try_read(0, memoryview(bytearray(1)))


@pytest.mark.parametrize("scheme", ["s3"])
def test_empty_object_of_a_store_that_refuses_head(
    url_of: Callable[[WebServer], str], tmp_path: Path
) -> None:
    """An empty object, which has no first byte, is opened also if the store refuses HEAD."""
    with serving(b"") as server:
        server.heads_fail, server.faults = True, ["status 403"]
        with opened(url_of(server), tmp_path, deadlines=DEADLINES) as file:
            assert server.struck["status 403"] == 1
            assert file.size() == 0


def test_empty_object_without_an_unsatisfiable_range(tmp_path: Path) -> None:
    """A server with ranges may send all of an empty object, where other servers answer 416."""
    with serving(b"") as server:
        server.extra = {"Accept-Ranges": "bytes"}
        server.always = "no range"
        with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
            assert server.struck["no range"] == 1
            assert file.size() == 0
        server.extra = {}
        with (
            pytest.raises(RemoteError, match="found HTTP status 200 without a range"),
            opened(server.url, tmp_path, deadlines=DEADLINES),
        ):
            pass


def test_http_to_another_machine() -> None:
    """A URL without TLS of another machine is refused before it is connected."""
    with pytest.raises(UsageError, match="allow_http"):
        open_remote(parse_address("http://192.0.2.1/a"), RemoteOptions())


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"Content-Range": "bytes 0-0/9000000000000000"}, "at most"),
        ({"Content-Range": "bytes 0-0/" + "9" * 30}, "without a range"),
        ({"Content-Range": "bytes 0-0/" + "9" * 5000}, "without a range"),
        ({"Content-Range": "bytes 0-0/*"}, "without a range"),
        ({"Content-Range": "bytes 0-0/-1"}, "without a range"),
        ({"Content-Range": "bytes 0-0/0"}, "without a range"),
        ({"Content-Range": "bytes */100"}, "without a range"),
        ({"Content-Range": "items 0-0/100"}, "without a range"),
        ({"Content-Range": "bytes 0-0/\u0661"}, "without a range"),
    ],
)
def test_strange_sizes(extra: dict[str, str], found: str, tmp_path: Path) -> None:
    """A size that no object can have is an error when the object is opened, or when it is read."""
    with serving(CONTENT) as server:
        server.extra = {name: value.encode().decode("latin-1") for name, value in extra.items()}
        with (
            pytest.raises(RemoteError, match=found) as caught,
            opened(server.url, tmp_path, deadlines=DEADLINES),
        ):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "date",
    [
        *("", "x", "0", "-", "Mon, 01 Jan 0000 00:00:00 GMT", "Mon, 01 Jan 9999 99:99:99 GMT"),
        *("1 Jan 1 0:0:0 -0000", "1 Jan 9999 23:59:59 -9999999999", "9" * 5000, ",", "Mon, ,"),
    ],
)
def test_strange_dates(date: str, tmp_path: Path) -> None:
    """A time of the last change that is none counts as missing."""
    with serving(CONTENT) as server:
        server.extra = {"Last-Modified": date}
        with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.stat().st_size == len(CONTENT)


def test_abandoned_opening(tmp_path: Path) -> None:
    """A task that is cancelled while a server does not answer goes on; the file is closed later."""

    async def run(url: str) -> None:
        with trio.move_on_after(0.05) as scope:
            await open_url(url, RemoteOptions(cache_directory=str(tmp_path), deadlines=DEADLINES))
        assert scope.cancelled_caught

    def is_unlocked() -> bool:
        with next(tmp_path.glob("*/*/data")).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with serving(CONTENT) as server:
        server.delay_seconds = 0.3
        trio.run(run, server.url)
        wait_until(lambda: bool(list(tmp_path.glob("*/*/data"))))
        wait_until(is_unlocked)


def test_reads_past_the_end(tmp_path: Path) -> None:
    """A read ends where the object ends, also when all of it is cached."""
    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        size = len(CONTENT)
        for _ in range(2):
            assert read(file, size - 10, 100) == CONTENT[-10:]
            assert read(file, size, 10) == b""
            assert read(file, size + UNIT_BYTES * 9, 10) == b""
            assert trio.run(file.pread, size - 10, 100) == CONTENT[-10:]
            assert trio.run(file.pread, size + UNIT_BYTES, 100) == b""
            for offset in (size - 9, size, size + UNIT_BYTES * 9):
                assert not file.try_read(offset, memoryview(bytearray(10)))
