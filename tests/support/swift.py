"""A real object store of the tests: one node of OpenStack Swift with its S3 interface.

The servers listen on ports of loopback that are free, keep all in one directory, and end with the
test process.
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import textwrap
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support.servers import free_ports, is_listening, missing_programs, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_KINDS: Final = ("account", "container", "object")
_PROGRAMS: Final = (*(f"swift-{kind}-server" for kind in (*_KINDS, "proxy")), "memcached")
_CONFIGURATION: Final = "/etc/swift/swift.conf"
_START_SECONDS: Final = 90.0
_PIPELINE: Final = (
    "catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo versioned_writes "
    "symlink proxy-server"
)
_RINGS: Final = """
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 1)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "d1",
                     "ip": "127.0.0.1", "port": int(port)})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""


@dataclass(frozen=True, slots=True)
class Swift:
    """A running store.

    Attributes:
        endpoint: The URL of its S3 interface.
        object_server: The process id of the server that has the content of the objects.
        log: What this server has answered.
    """

    endpoint: str
    object_server: int
    log: Path
    _objects: str
    _token: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by which clients find the store and may use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str, *, versions: bool = False) -> None:
        """Make a bucket, with versions if wanted."""
        self.request("PUT", name, None, {"X-Versions-Enabled": str(versions).lower()})

    def put(self, bucket: str, key: str, content: bytes) -> str:
        """Store an object; return its version if the bucket has versions."""
        answer = self.request("PUT", f"{bucket}/{key}", content)
        return answer.headers.get("X-Object-Version-Id", "")

    def keys(self, bucket: str) -> list[str]:
        """Return the keys in a bucket; those of unfinished uploads are in ``BUCKET+segments``."""
        try:
            answer = self.request("GET", bucket.replace("+", "%2B"))
        except urllib.error.HTTPError as error:
            error.close()
            return []
        return answer.body.decode().splitlines()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Answer:
        """Make a request of Swift's own interface."""
        url = f"{self.endpoint}/v1/AUTH_test/{path}"
        return _request(method, url, body, {"X-Auth-Token": self._token, **(headers or {})})

    def answers(self, bucket: str, key: str) -> list[int]:
        """Return the number of bytes of each answer with a range of an object.

        The server logs an answer when it has sent it, so a client may be faster.  A request that is
        made here comes after all others.
        """
        marker = f"logged-{self.log.stat().st_size}"
        # Asked directly: under load, the proxy forgets the token.
        url = f"{self._objects}/d1/0/AUTH_test/{bucket}/{marker}"
        try:
            _request("GET", url, None, {})
        except urllib.error.HTTPError as error:
            error.close()
        wait_for(lambda: marker in self.log.read_text("utf-8"), _START_SECONDS, self.log.parent)
        found = re.compile(rf'"GET /d1/\d+/AUTH_test/{bucket}/{key}" 206 (\d+) ')
        return [int(match[1]) for match in found.finditer(self.log.read_text("utf-8"))]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the server of the objects answer nothing in the block."""
        os.kill(self.object_server, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.object_server, signal.SIGCONT)


def why_no_swift() -> str:
    """Return why Swift cannot be started here; empty if it can."""
    missing = missing_programs(*_PROGRAMS)
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: swift-proxy and others)"
    if not os.access(_CONFIGURATION, os.R_OK):
        return f"{_CONFIGURATION} cannot be read by this user"
    return ""


@contextmanager
def serving_swift(directory: Path) -> Iterator[Swift]:
    """Run a store in a new directory for the block."""
    ports = dict(zip((*_KINDS, "proxy", "memcached"), free_ports(5), strict=True))
    (directory / "devices/d1").mkdir(parents=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for kind in (*_KINDS, "proxy"):
        text = _settings(kind, directory, user, ports)
        (directory / f"{kind}.conf").write_text(text)
    subprocess.run(
        ["/usr/bin/python3", "-c", _RINGS, directory, *(str(ports[kind]) for kind in _KINDS)],
        check=True,
    )
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    with ExitStack() as stack:

        def start(name: str, *command: str) -> int:
            log = stack.enter_context((directory / f"{name}.log").open("wb"))
            return stack.enter_context(running(list(command), log)).pid

        memory = ("-l", "127.0.0.1", "-p", str(ports["memcached"]), "-m", "16", "-u", user)
        start("memcached", "memcached", *memory)
        # If Swift cannot reach memcached, it does not use it for a minute.
        wait_for(lambda: is_listening(ports["memcached"]), _START_SECONDS, directory)
        pids = {
            kind: start(kind, f"swift-{kind}-server", str(directory / f"{kind}.conf"), "-v")
            for kind in (*_KINDS, "proxy")
        }
        wait_for(lambda: _is_up(endpoint), _START_SECONDS, directory)
        credentials = {"X-Auth-User": "test:tester", "X-Auth-Key": "testing"}
        answer = _request("GET", f"{endpoint}/auth/v1.0", None, credentials)
        yield Swift(
            endpoint,
            pids["object"],
            directory / "object.log",
            f"http://127.0.0.1:{ports['object']}",
            answer.headers["X-Auth-Token"],
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    headers: dict[str, str]
    body: bytes


def _request(
    method: str, url: str, body: bytes | None, headers: dict[str, str], seconds: float = 60.0
) -> _Answer:
    request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310  loopback
    with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310  loopback
        return _Answer(dict(answer.headers), answer.read())


def _is_up(endpoint: str) -> bool:
    """Return whether the store can keep an object, so that all four servers have started."""
    # A request may hang if a server starts while the proxy makes it.
    seconds = 2.0
    credentials = {"X-Auth-User": "test:tester", "X-Auth-Key": "testing"}
    with suppress(OSError):
        answer = _request("GET", f"{endpoint}/auth/v1.0", None, credentials, seconds)
        headers = {"X-Auth-Token": answer.headers["X-Auth-Token"]}
        _request("PUT", f"{endpoint}/v1/AUTH_test/first", None, headers, seconds)
        _request("PUT", f"{endpoint}/v1/AUTH_test/first/object", b"content", headers, seconds)
        return True
    return False


def _settings(kind: str, directory: Path, user: str, ports: dict[str, int]) -> str:
    """Return the configuration file of one of the servers."""
    common = textwrap.dedent(
        f"""\
        [DEFAULT]
        bind_ip = 127.0.0.1
        bind_port = {ports[kind]}
        workers = 0
        user = {user}
        swift_dir = {directory}
        """
    )
    if kind != "proxy":
        return common + textwrap.dedent(
            f"""\
            devices = {directory}/devices
            mount_check = false
            [pipeline:main]
            pipeline = {kind}-server
            [app:{kind}-server]
            use = egg:swift#{kind}
            """
        )
    text = common + textwrap.dedent(
        f"""\
        [pipeline:main]
        pipeline = {_PIPELINE}
        [app:proxy-server]
        use = egg:swift#proxy
        account_autocreate = true
        [filter:tempauth]
        use = egg:swift#tempauth
        user_test_tester = testing .admin
        [filter:cache]
        use = egg:swift#memcache
        memcache_servers = 127.0.0.1:{ports["memcached"]}
        [filter:versioned_writes]
        use = egg:swift#versioned_writes
        allow_object_versioning = true
        [filter:slo]
        use = egg:swift#slo
        # Parts go with their object.  Swift 2.35 would leave them to a server that is not run here.
        allow_async_delete = false
        """
    )
    done = re.findall(r"^\[(?:filter|app):(.+)\]$", text, re.MULTILINE)
    others = set(_PIPELINE.split()) - set(done)
    for name in sorted(others):
        text += f"[filter:{name}]\nuse = egg:swift#{name}\n"
    return text
