"""A fleet of ten machines that start from one image: what it asks of real servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.fleet import (
    BUCKET,
    KEY,
    Golden,
    Outcome,
    cached_server,
    make_golden,
    measure,
    nginx_server,
    swift_server,
)
from benchmarks.fleetload import MIB, Cost, cost, file_reads, needed_requests
from tests.support import qemu
from tests.support.nginx import serving_cache, serving_nginx

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.nginx import Nginx
    from tests.support.swift import Swift

MACHINES = 10


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Give an image with a disk of 48 MiB."""
    return make_golden(tmp_path_factory.mktemp("golden"), 48)


def test_fleet_of_a_web_server(nginx: Nginx, golden: Golden) -> None:
    """Each machine makes the requests that follow from what it reads."""
    outcome = measure(nginx_server(nginx, golden), golden, MACHINES)
    assert outcome.is_near, outcome


def test_fleet_of_an_object_store(swift: Swift, golden: Golden) -> None:
    """An object store gets the same requests."""
    assert BUCKET == "golden"
    outcome = measure(swift_server(swift, golden), golden, MACHINES)
    assert outcome.is_near, outcome


def test_fleet_behind_a_cache(nginx: Nginx, golden: Golden, tmp_path: Path) -> None:
    """Behind a cache, the server sends each part of the image once, whatever the fleet's size."""
    with serving_cache(tmp_path / "between", nginx) as cache:
        server = cached_server(nginx, cache, golden)
        outcome = measure(server, golden, MACHINES)
        assert outcome.is_near, outcome
        assert outcome.found.bytes <= golden.image.stat().st_size
        assert measure(server._replace(expected=lambda _: Cost(0, 0)), golden, 2).found == (0, 0)


def test_fleet_beyond_the_limit_of_a_server(golden: Golden, tmp_path: Path) -> None:
    """A server that refuses what is beyond its rate slows a fleet down, and causes no error."""
    with serving_nginx(tmp_path / "limited", max_rate=200) as nginx:
        outcome = measure(nginx_server(nginx, golden), golden, MACHINES)
        assert outcome.is_near, outcome
        statuses = [status for status, _ in nginx.requests(f"/{KEY}")]
        assert statuses.count(503) > MACHINES


def test_a_difference_is_noticed() -> None:
    """More than a tenth too much or too little is no match."""
    assert Outcome(Cost(110, 100), Cost(100, 100), 1).is_near
    assert not Outcome(Cost(111, 100), Cost(100, 100), 1).is_near
    assert not Outcome(Cost(100, 89), Cost(100, 100), 1).is_near


def test_requests_follow_from_reads() -> None:
    """A random read costs one unit; a sequential reader has more and more fetched ahead of it."""
    size = 64 * MIB
    assert cost(needed_requests([(0, 4096), (9 * MIB, 4096)], size), size) == (2, MIB // 2)
    assert needed_requests([(0, 2 * MIB)], size) == [range(4), range(4, 8)]
    sequential = [(at, MIB // 4) for at in range(0, 2 * MIB, MIB // 4)]
    assert needed_requests(sequential, size)[:3] == [range(1), range(1, 2), range(2, 3)]
    assert cost(needed_requests(sequential, size), size).bytes < 12 * MIB
    assert cost(needed_requests(sequential, size, max_ahead_bytes=0), size) == (8, 2 * MIB)


def test_reads_of_tables_are_counted(golden: Golden) -> None:
    """Before the data of a disk, the header and both tables are read."""
    image = golden.image.read_bytes()
    reads = list(file_reads(image, [(0, 4096), (4096, 4096)]))
    assert len(reads) == 5
    assert reads[0][0] == 0
    assert image[reads[-1][0] :][:4096] == golden.raw.read_bytes()[4096:8192]


def test_reads_of_holes_cost_their_tables_only(tmp_path: Path) -> None:
    """A cluster without data is not read; its table is, if there is one."""
    image = qemu.create(tmp_path / "sparse.qed", 64 * MIB)
    qemu.io(image, "write -P 1 1M 64k", "write -z 2M 64k")
    content = image.read_bytes()
    data = list(file_reads(content, [(MIB, 4096)]))[-1]
    assert content[data[0] :][:4096] == b"\1" * 4096
    for offset in (0, 2 * MIB):
        reads = list(file_reads(content, [(offset, 4096)]))
        assert len(reads) == 3
        assert data not in reads
