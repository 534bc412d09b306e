"""What surrounds tests of remote files: real servers, and a check that no thread is left.

Each server is started once in a test process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.nginx import serving_nginx, why_no_nginx
from tests.support.remotes import fetching_threads
from tests.support.swift import serving_swift, why_no_swift
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

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
