"""What surrounds tests of remote files: real servers, and a check that no thread is left.

Each server is started once in a test process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.nginx import serving_nginx, why_no_nginx
from tests.support.remotes import fetching_threads
from tests.support.swift import serving_swift, why_no_swift
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.nginx import Nginx
    from tests.support.swift import Swift


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


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Fail a test after which a thread of a closed fetcher goes on."""
    yield
    wait_until(lambda: not fetching_threads())


@pytest.fixture
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of stores from the environment, and the files of the home directory."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "SSL_CERT")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def store(swift: Swift, bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> Swift:  # noqa: ARG001  its effect counts
    """Return the object store, which the environment names."""
    for name, value in swift.variables.items():
        monkeypatch.setenv(name, value)
    return swift
