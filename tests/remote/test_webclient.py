"""Clients of web servers: how long they try, what they send to whom, what they believe."""

from __future__ import annotations

import base64
import errno
import gc
import os
import select
import signal
import socket
import struct
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qedfuse.errors import RemoteError
from qedfuse.remote import client, connecting, deadline, resolver, webresponse
from qedfuse.remote import object as remote_object
from qedfuse.remote.address import parse_address, parse_prefix
from qedfuse.remote.client import (
    AttemptError,
    ClientOptions,
    UnusableError,
    Version,
    settled_version,
)
from qedfuse.remote.object import make_client, open_object
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.resolver import Resolver
from qedfuse.remote.webclient import WebClient
from qedfuse.remote.webpools import WebPools
from tests.support.remotes import DEADLINES, PATIENT, opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from urllib3.connection import HTTPConnection

CONTENT = some_bytes(1.5)

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts follow each other soon."""
    monkeypatch.setattr(remote_object, "_MAX_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote_object, "_FIRST_PAUSE_SECONDS", 0.01)


# --- how long ---------------------------------------------------------------------------


@pytest.mark.usefixtures("short_pauses")
def test_an_outage_is_bounded_by_time_alone(tmp_path: Path) -> None:
    """A read goes on through any number of failed attempts within its time."""
    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=PATIENT) as file:
        server.faults = ["status 503", "reset"] * 20
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert server.struck.total() == 40


@pytest.mark.usefixtures("short_pauses")
def test_a_server_that_answers_is_asked_for_the_whole_time_at_the_opening(tmp_path: Path) -> None:
    """A server that is too busy is asked again at the opening, for longer than an attempt takes."""
    patient = Deadlines(connect_seconds=0.2, attempt_seconds=0.2, total_seconds=60)
    with serving(CONTENT) as server:
        server.faults = ["status 503"] * 60
        with opened(server.url, tmp_path, deadlines=patient):
            assert server.struck["status 503"] == 60


def test_a_refused_connection_ends_an_opening_soon(tmp_path: Path) -> None:
    """A server that cannot be connected at the opening is given up long before the whole time."""
    patient = Deadlines(connect_seconds=0.3, attempt_seconds=0.5, total_seconds=600)
    begin = time.monotonic()
    with (
        pytest.raises(RemoteError, match="Connection refused"),
        opened("http://127.0.0.1:9/disk", tmp_path, deadlines=patient),
    ):
        pass
    assert time.monotonic() - begin < 60


def test_a_server_without_tls_ends_an_opening_soon(tmp_path: Path) -> None:
    """A server that does not speak TLS is given up long before the whole time."""
    patient = Deadlines(connect_seconds=0.3, attempt_seconds=0.5, total_seconds=600)
    begin = time.monotonic()
    with (
        serving(CONTENT) as server,
        pytest.raises(RemoteError, match="TLS: ") as caught,
        opened(server.url.replace("http:", "https:"), tmp_path, deadlines=patient),
    ):
        pass
    assert time.monotonic() - begin < 60
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("short_pauses")
def test_a_reset_before_the_handshake_of_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that the server resets before the handshake is closed.

    The server resets each connection between the system calls `connect` and `getpeername`.
    """
    resets: list[object] = []
    short = Deadlines(connect_seconds=1.0, attempt_seconds=0.1, total_seconds=0.2)

    def connect(connection: HTTPConnection, host: str) -> socket.socket:
        sock = connecting.connect(connection, host)
        with listener.accept()[0] as accepted:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        poll = select.poll()
        poll.register(sock, 0)
        resets.append(poll.poll(10_000))
        return sock

    monkeypatch.setattr(deadline, "connect", connect)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/disk"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with (
                pytest.raises(RemoteError, match="reset"),
                opened(url, tmp_path, deadlines=short),
            ):
                pass
            gc.collect()
        assert resets
        assert all(resets)
        assert not [str(each.message) for each in caught]


@pytest.mark.parametrize("status", [501, 505])
def test_a_server_that_does_not_know_a_request_is_asked_once(tmp_path: Path, status: int) -> None:
    """A server that does not implement a request is not asked again."""
    with serving(CONTENT) as server:
        server.required, server.refusal = "Basic", status
        with (
            pytest.raises(RemoteError, match=f"found HTTP status {status}, expected 206"),
            opened(server.url, tmp_path, deadlines=PATIENT),
        ):
            pass
        assert len(server.authorizations) == 1


def test_a_name_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lookup of a name counts for the connection; all attempts together use one thread."""
    ended = threading.Event()
    lookups = []

    def lookup(host: str, _port: int, flags: int) -> list[Any]:
        if flags:
            raise socket.gaierror
        lookups.append(host)
        ended.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(resolver, "_lookup", lookup)
    short = Deadlines(connect_seconds=0.2, attempt_seconds=0.7, total_seconds=600)
    expected = (
        r"https://images\.example/disk: found no connection to images\.example within 0\.2 seconds "
        r"\(attempts: \d+\)"
    )
    begin = time.monotonic()
    with (
        pytest.raises(RemoteError, match=f"^{expected}$"),
        opened("https://images.example/disk", tmp_path, deadlines=short),
    ):
        pass
    assert time.monotonic() - begin < 60
    ended.set()
    assert lookups == ["images.example"]


def test_a_name_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message about an unknown host says that it has no address."""

    def lookup(_host: str, _port: int, flags: int) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known" if not flags else "")

    monkeypatch.setattr(resolver, "_lookup", lookup)
    expected = r"disk: found no address of the host \(Name or service not known\), expected one \("
    with (
        pytest.raises(RemoteError, match=expected),
        opened("https://images.example/disk", tmp_path, deadlines=DEADLINES),
    ):
        pass


def test_lookups_of_a_name_share_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that need the same name at the same time wait for one lookup."""
    go_on = threading.Event()
    lookups = []

    def lookup(host: str, port: int, flags: int) -> list[Any]:
        if flags:
            raise socket.gaierror
        lookups.append(host)
        go_on.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(resolver, "_lookup", lookup)
    names = Resolver()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(names.resolve("images.example", 80, 60)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while not lookups:
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert found[0][0][4] == ("127.0.0.1", 80)
    assert 1 <= len(lookups) <= 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_looks_names_up_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child waits neither for a lookup of its parent nor for a lock that a thread held."""
    began, go_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def lookup(_host: str, port: int, flags: int) -> list[Any]:
        if flags:
            raise socket.gaierror
        if os.getpid() == parent:
            began.set()
            go_on.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(resolver, "_lookup", lookup)
    names = Resolver()
    with pytest.raises(TimeoutError):
        names.resolve("images.example", 80, 0)
    assert began.wait(60)
    held = names._lock
    held.acquire()
    child = os.fork()
    if not child:
        try:
            signal.alarm(10)
            found = names.resolve("images.example", 80, 20)
            os._exit(0 if found[0][4] == ("127.0.0.1", 80) else 1)
        finally:
            os._exit(2)
    held.release()
    go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_lookup_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that finds no memory fails without a wait, and so does not hinder the next one."""
    failures: list[Exception] = [MemoryError()]

    def lookup(_host: str, port: int, flags: int) -> list[Any]:
        if flags:
            raise socket.gaierror
        if failures:
            raise failures.pop()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(resolver, "_lookup", lookup)
    names = Resolver()
    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        names.resolve("images.example", 80, 60)
    assert caught.value.errno == errno.ENOMEM
    assert names.resolve("images.example", 80, 60)[0][4] == ("127.0.0.1", 80)


def test_the_second_address_of_a_host_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose first address refuses is reached by its second one, in one attempt."""

    def lookup(_host: str, port: int, _flags: int) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("127.0.0.77", "127.0.0.1")
        ]

    monkeypatch.setattr(resolver, "_lookup", lookup)
    with serving(CONTENT) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with opened(url, tmp_path, deadlines=PATIENT) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT


# --- what is believed -------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the pauses of `settled_version` instead of making them."""
    found: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.mark.parametrize("seconds", [None, 1.9, 0.0, -5.0])
def test_a_fresh_time_is_asked_for_again(naps: list[float], seconds: float | None) -> None:
    """A time of the last change that is not old enough is relied on only after a pause."""
    found = settled_version(lambda: (Version(7, "", 1000.0), seconds))
    assert found == Version(7, "", 1000.0)
    assert naps == [2.0]


def test_a_change_during_the_pause(naps: list[float]) -> None:
    """A version that was replaced during the pause is not used."""
    times = iter([1000.0, 1001.0, 1001.0])
    assert settled_version(lambda: (Version(7, "", next(times)), 0.0)).modified == 1001.0
    assert naps == [2.0, 2.0]


def test_endless_changes(naps: list[float]) -> None:
    """An object that changes again and again is an error after a few pauses."""
    times = iter(range(100))
    with pytest.raises(AttemptError, match="found changes every few seconds"):
        settled_version(lambda: (Version(7, "", next(times)), 0.0))
    assert len(naps) == 5


@pytest.mark.parametrize(
    ("version", "seconds"),
    [(Version(7, '"tag"', 1000.0), 0.0), (Version(7, "", None), None), (Version(7, "", 1.0), 2.0)],
)
def test_what_needs_no_pause(naps: list[float], version: Version, seconds: float | None) -> None:
    """A strong tag, no time at all, and a time that is old enough need no second look."""
    assert settled_version(lambda: (version, seconds)) == version
    assert not naps


def test_a_file_that_was_just_written(tmp_path: Path, naps: list[float]) -> None:
    """A server without tags that has just got the file is asked twice, by the server's clock."""
    with serving(CONTENT) as server:
        server.etag, server.modified = "", time.time()
        with opened(server.url, tmp_path) as file:
            assert naps == [2.0]
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert server.requests[:2] == [(0, 0), (0, 0)]


def test_a_date_without_a_zone_is_universal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zone ``-0000`` is UTC, whatever the zone of this machine is."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        answer: Any = SimpleNamespace(
            headers={
                "Last-Modified": "Thu, 01 Jan 1970 00:01:00 -0000",
                "Date": "Thu, 01 Jan 1970 00:01:03 GMT",
            }
        )
        assert webresponse.version_of(answer, 1).modified == 60.0
        assert webresponse.seconds_since_change(answer) == 3.0
    finally:
        monkeypatch.undo()
        time.tzset()


# --- credentials ------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    """Return the header for a user."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("given", "header"),
    [
        ({"WEB_USER": "jo", "WEB_PASSWORD": "pä:ss"}, basic("jo", "pä:ss")),
        ({"WEB_TOKEN": "abc.def"}, "Bearer abc.def"),
    ],
)
def test_credentials_are_sent(tmp_path: Path, given: dict[str, str], header: str) -> None:
    """A user with a password, or a token, is sent to the host that the file names."""
    with serving(CONTENT) as server:
        server.required = header
        variables = {"WEB_HOST": f"127.0.0.1:{server.port}", **given}
        options = RemoteOptions(
            cache_directory=str(tmp_path),
            deadlines=PATIENT,
            credentials=tuple(variables.items()),
        )
        file = open_remote(parse_address(server.url), options)
        try:
            assert read(file, 0, len(CONTENT)) == CONTENT
        finally:
            file.close()
        assert set(server.authorizations) == {header}


def test_credentials_are_not_sent_to_another_host(tmp_path: Path) -> None:
    """Neither a redirection nor another URL makes the client send credentials elsewhere."""
    with serving(CONTENT) as other, serving(CONTENT) as server:
        server.always = "redirect elsewhere"
        server.elsewhere = other.url
        variables = {"WEB_HOST": f"127.0.0.1:{server.port}", "WEB_TOKEN": "secret"}
        options = RemoteOptions(
            cache_directory=str(tmp_path),
            deadlines=PATIENT,
            allowed=(parse_prefix(other.url.rpartition("/")[0]),),
            credentials=tuple(variables.items()),
        )
        for url in (server.url, other.url):
            file = open_remote(parse_address(url), options)
            try:
                assert read(file, 0, len(CONTENT)) == CONTENT
            finally:
                file.close()
        assert set(server.authorizations) == {"Bearer secret"}
        assert set(other.authorizations) == {""}


def test_missing_credentials_are_named(tmp_path: Path) -> None:
    """A server that asks for credentials gets none, and the message says how to give them."""
    with serving(CONTENT) as server:
        server.required, server.refusal = "Basic", 401
        expected = "refused: found HTTP status 401 .found no credentials for the host, expected a "
        with (
            pytest.raises(RemoteError, match=expected),
            opened(server.url, tmp_path, deadlines=DEADLINES),
        ):
            pass


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"WEB_TOKEN": "hush"}, "WEB_HOST: found none"),
        ({"WEB_HOST": "h"}, "WEB_HOST: found nothing beside it"),
        ({"WEB_HOST": "h", "WEB_USER": "hush"}, "WEB_HOST: found WEB_USER beside it, expected"),
        ({"WEB_HOST": "h", "WEB_USER": "hush", "WEB_PASSWORD": "x", "WEB_TOKEN": "x"}, "WEB_TOKEN"),
        ({"WEB_HOST": "h/hush", "WEB_TOKEN": "x"}, "WEB_HOST: found no valid host"),
        ({"WEB_HOST": "s3://hush", "WEB_TOKEN": "x"}, "WEB_HOST: found no valid host"),
        ({"WEB_HOST": "u:hush@h", "WEB_TOKEN": "x"}, "WEB_HOST: found no valid host"),
        ({"WEB_HOST": "h", "WEB_TOKEN": "hush hush"}, "WEB_TOKEN: found a character"),
        ({"WEB_HOST": "h", "WEB_USER": "hush:", "WEB_PASSWORD": "x"}, "WEB_USER: found a colon"),
    ],
)
def test_incomplete_credentials(given: dict[str, str], found: str) -> None:
    """Credentials that are incomplete or contradictory are refused; no value is shown."""
    options = ClientOptions(credentials=tuple(given.items()))
    with pytest.raises(RemoteError) as caught:
        make_client(parse_address("https://h/x"), options)
    assert f"https://h/x: credentials: {found}" in str(caught.value) or found == "WEB_TOKEN"
    assert found in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Give a file of credentials that is empty."""
    path = tmp_path / "secrets"
    path.touch(0o600)
    return path


def test_a_credentials_file_is_read_again(secrets: Path) -> None:
    """When a server refuses, the file of credentials is read again, and the read succeeds."""
    with serving(CONTENT) as server:
        host = f"WEB_HOST=127.0.0.1:{server.port}\n"
        secrets.write_text(f"{host}WEB_TOKEN=old\n")
        given = ClientOptions(attempt_seconds=5.0, credentials_file=str(secrets)).renewed()
        address = parse_address(server.url)
        server.required = "old"
        source = open_object(address, make_client(address, given), PATIENT)
        assert bytes(source.get(0, 100)) == CONTENT[:100]
        server.required = "new"
        secrets.write_text(f"{host}WEB_TOKEN=new\n")
        assert bytes(source.get(100, 100)) == CONTENT[100:200]
        assert server.authorizations[-2:] == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize("is_missing", [False, True])
def test_a_credentials_file_that_cannot_be_read_again(secrets: Path, is_missing: bool) -> None:  # noqa: FBT001
    """If the file cannot be read again, the former credentials go on, and a refusal says why."""
    with serving(CONTENT) as server:
        secrets.write_text(f"WEB_HOST=127.0.0.1:{server.port}\nWEB_TOKEN=old\n")
        given = ClientOptions(attempt_seconds=5.0, credentials_file=str(secrets)).renewed()
        address = parse_address(server.url)
        source = open_object(address, make_client(address, given), PATIENT)
        if is_missing:
            secrets.unlink()
        else:
            secrets.write_text("half a li")
        server.faults = ["status 403"]
        assert bytes(source.get(0, 100)) == CONTENT[:100]
        assert server.struck["status 403"] == 1
        server.faults = ["status 403", "status 403"]
        with pytest.raises(RemoteError, match="refused: found HTTP status 403") as caught:
            source.get(0, 100)
        assert caught.value.errno == 13
        assert ("cannot open" if is_missing else "line 1: found another form") in str(caught.value)


def test_an_expired_key_of_a_store_is_read_again(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a store refuses a key, a new one in the file of credentials is used."""
    with serving(CONTENT) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        key = "AWS_ACCESS_KEY_ID={}\nAWS_SECRET_ACCESS_KEY=x\n"
        secrets.write_text(key.format("old"))
        server.required = "Credential=old/"
        given = ClientOptions(attempt_seconds=5.0, credentials_file=str(secrets)).renewed()
        address = parse_address("s3://images/disk.qed")
        source = open_object(address, make_client(address, given), PATIENT)
        assert bytes(source.get(0, 100)) == CONTENT[:100]
        server.required = "Credential=new/"
        with pytest.raises(RemoteError, match="refused") as caught:
            source.get(100, 100)
        assert caught.value.errno == 13
        secrets.write_text(key.format("new"))
        assert bytes(source.get(100, 100)) == CONTENT[100:200]


# --- proxies ----------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """Run a proxy that refuses each request; yield its port and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    requests.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        yield listener.getsockname()[1], requests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_user_of_a_proxy_is_sent(
    proxy: tuple[int, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User and password in the URL of a proxy are sent to it, and are in no message."""
    port, requests = proxy
    monkeypatch.setenv("https_proxy", f"http://jo:s%20ecret@127.0.0.1:{port}")
    with (
        pytest.raises(RemoteError) as caught,
        opened("https://images.example/disk", tmp_path, deadlines=DEADLINES),
    ):
        pass
    assert requests[0].startswith(b"CONNECT images.example:443 ")
    assert f"Proxy-Authorization: {basic('jo', 's ecret')}".lower().encode() in requests[0].lower()
    assert "407" in str(caught.value)
    assert "ecret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_host_has_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of a redirection is reached as the environment says for it."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "near.example")
    pools = WebPools()

    def proxy_for(url: str) -> object:
        return pools.pool_for(parse_address(url)).connection_pool_kw.get("_proxy")

    assert str(proxy_for("https://far.example/x")) == "http://proxy.example:3128"
    assert proxy_for("https://near.example/x") is None
    assert proxy_for("http://far.example/x") is None
    assert proxy_for("https://127.0.0.1/x") is None


@pytest.mark.parametrize(
    ("url", "location", "is_followed"),
    [
        ("http://images.example/x", "https://images.example/y", True),
        ("http://images.example:80/x", "https://images.example:443/y", True),
        ("https://images.example/x", "https://images.example:443/y", True),
        ("http://images.example/x", "https://images.example:8443/y", False),
        ("http://images.example:8080/x", "https://images.example/y", False),
        ("http://images.example/x", "https://other.example/y", False),
        ("https://images.example/x", "http://images.example/y", False),
        ("https://images.example:80/x", "https://images.example:443/y", False),
    ],
)
def test_redirections_on_the_same_host(url: str, location: str, *, is_followed: bool) -> None:
    """A redirection on the same host keeps the port, or leads from HTTP to HTTPS."""
    client = WebClient(parse_address(url), ClientOptions())
    if is_followed:
        assert client._redirected(parse_address(url), location) == parse_address(location)
        return
    with pytest.raises(UnusableError, match=r"found a redirection to .*, expected "):
        client._redirected(parse_address(url), location)


def test_parallel_reads_remember_a_redirection(tmp_path: Path) -> None:
    """The origin of a redirection is asked once, also when many ranges are read at a time."""
    content = some_bytes(24)
    with serving(content) as other, serving(b"") as server:
        server.always = "redirect elsewhere"
        server.elsewhere = other.url
        options = RemoteOptions(
            cache_directory=str(tmp_path),
            deadlines=PATIENT,
            allowed=(parse_prefix(other.url.rpartition("/")[0]),),
        )
        file = open_remote(parse_address(server.url), options)
        try:
            assert read(file, 0, len(content)) == content
        finally:
            file.close()
        assert len(other.requests) > 4
        assert server.struck["redirect elsewhere"] == 1


@pytest.mark.parametrize("path", ["/a%2Bb%3B", "/a+b;"])
@pytest.mark.parametrize("is_redirected", [False, True])
def test_the_given_spelling_of_a_path_is_requested(
    tmp_path: Path,
    path: str,
    is_redirected: bool,  # noqa: FBT001  a parameter of the test
) -> None:
    """The server is asked for the path of the URL, of two that it distinguishes."""
    with serving(b"no object") as server, serving(b"no object") as origin:
        server.others = {spelling: spelling.encode() for spelling in ("/a%2Bb%3B", "/a+b;")}
        url = server.url.removesuffix("/images/disk.qed") + path
        if is_redirected:
            origin.always, origin.elsewhere = "redirect elsewhere", url
        allowed = (parse_prefix(server.url.removesuffix("/images/disk.qed")),)
        options = RemoteOptions(cache_directory=str(tmp_path), deadlines=DEADLINES, allowed=allowed)
        file = open_remote(parse_address(origin.url if is_redirected else url), options)
        try:
            assert read(file, 0, len(path)) == path.encode()
        finally:
            file.close()


def test_a_home_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory reads from stores; there are just no files of settings."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for url in ("s3://b/k", "gs://b/k"):
        make_client(parse_address(url), replace(ClientOptions(), attempt_seconds=1.0))
