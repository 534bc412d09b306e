"""What surrounds tests of remote files: real servers, and a check that no thread is left.

Each server is started once in a test process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.nginx import make_certificate, serving_nginx, why_no_nginx
from tests.support.remotes import fetching_threads
from tests.support.servers import missing_programs
from tests.support.swift import serving_swift, why_no_swift
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.nginx import Nginx
    from tests.support.swift import Swift
    from tests.support.webserver import WebServer


NAMES: Final = (
    "store.example",
    "s3.us-east-1.amazonaws.com",
    "bucket.vpce-1.s3.eu-central-1.vpce.amazonaws.com",
    "account.blob.core.windows.net",
)
"""Names of hosts for which servers of the tests have a certificate."""


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """Run an object store with the empty buckets ``golden`` and ``versions``."""
    if reason := why_no_swift():
        pytest.skip(f"Swift: {reason}")
    with serving_swift(tmp_path_factory.mktemp("swift") / "store") as server:
        server.make_bucket("golden")
        server.make_bucket("versions", versions=True)
        yield server


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Run a web server."""
    if reason := why_no_nginx():
        pytest.skip(f"nginx: {reason}")
    with serving_nginx(tmp_path_factory.mktemp("nginx") / "web") as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for loopback and `NAMES`, in one file with its key."""
    if missing := missing_programs("openssl"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    directory = tmp_path_factory.mktemp("certificate")
    path = make_certificate(directory, *NAMES)
    path.write_bytes(path.read_bytes() + (directory / "key.pem").read_bytes())
    return path


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Fail a test after which a thread of a closed fetcher goes on."""
    yield
    wait_until(lambda: not fetching_threads())


@pytest.fixture
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of stores and proxies, and the files of the home directory."""
    for name in list(os.environ):
        is_of_store = name.startswith(
            ("AWS_", "GOOGLE_", "GCE_", "AZURE_", "IDENTITY_", "SSL_CERT")
        )
        if is_of_store or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def store(swift: Swift, bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> Swift:  # noqa: ARG001  its effect counts
    """Return the object store, which the environment names."""
    for name, value in swift.variables.items():
        monkeypatch.setenv(name, value)
    return swift


@pytest.fixture(params=["http", "s3"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return the scheme of a URL: that of a web server, or that of an object store."""
    return str(request.param)


@pytest.fixture
def url_of(
    scheme: str,
    bare_environment: None,  # noqa: ARG001  its effect counts
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[WebServer], str]:
    """Return a function that gives the URL of a server's object in ``scheme``.

    For ``s3`` the environment names the server as the store, with a temporary key.
    """

    def find(server: WebServer) -> str:
        if scheme == "http":
            return server.url
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        return "s3://images/disk.qed"

    return find
