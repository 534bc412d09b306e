"""What reads ask of a server, counted by the server: each unit once, in few requests."""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.remotes import opened, read, some_bytes
from tests.support.webserver import serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qedfuse.remote.remotefile import RemoteFile
    from tests.support.webserver import WebServer

UNITS = 160
CONTENT = some_bytes(UNITS)


@contextmanager
def reading(cache: Path) -> Iterator[tuple[WebServer, RemoteFile]]:
    """Serve and open the content; the request of the opening is not counted."""
    with serving(CONTENT) as server, opened(server.url, cache) as file:
        server.requests.clear()
        yield server, file


def asked_units(server: WebServer) -> list[int]:
    """Return the units that were asked for, each as often as it was; in whole units only."""
    units: list[int] = []
    for first, last in server.requests:
        assert first % UNIT_BYTES == 0
        assert (last + 1) % UNIT_BYTES == 0 or last + 1 == len(CONTENT)
        assert last + 1 - first <= 4 << 20
        units += range(first // UNIT_BYTES, last // UNIT_BYTES + 1)
    return units


@pytest.mark.parametrize("step", [4096, 1 << 16, 1 << 19, 1 << 21])
def test_a_sequential_reader(tmp_path: Path, step: int) -> None:
    """A reader that has read 8 MiB in sequence causes one request for 4 MiB, before that for 1 MiB.

    A few requests more are made at its beginning.
    Reads of units that are ready do not reach the fetcher, as in a mount, whose extension answers
    them.
    """
    with reading(tmp_path / "cache") as (server, file):
        ready = file.fetcher.ready
        for offset in range(0, len(CONTENT), step):
            last = (offset + step - 1) // UNIT_BYTES
            if ready.find(0, offset // UNIT_BYTES, last + 1) >= 0:
                assert read(file, offset, step) == CONTENT[offset : offset + step]
        assert sorted(asked_units(server)) == list(range(UNITS))
        lengths = [last + 1 - first for first, last in sorted(server.requests)]
        begin = next(at for at, length in enumerate(lengths) if length > 1 << 20)
        assert sum(lengths[:begin]) >= 8 << 20
        assert 4 << 20 in lengths
        assert len(lengths) <= UNITS // 4


def test_the_next_units_are_fetched_before_they_are_needed(tmp_path: Path) -> None:
    """A sequential reader never finds that the rest of its window is missing as well."""
    with reading(tmp_path / "cache") as (server, file):
        fetcher = file.fetcher
        for unit in range(UNITS):
            wait_until(lambda: not fetcher._flights)
            if unit >= 8 and unit < UNITS - 32:
                assert fetcher.is_stored(unit, unit + 3)
            if not fetcher.ready[unit]:
                read(file, unit * UNIT_BYTES, 4096)
        assert sorted(asked_units(server)) == list(range(UNITS))


def test_readers_of_the_same_range(tmp_path: Path) -> None:
    """Eight threads that read all at different paces cause one request for each unit."""
    with reading(tmp_path / "cache") as (server, file):
        wrong: list[int] = []

        def run(step: int) -> None:
            offsets = range(0, len(CONTENT), step)
            wrong.extend(x for x in offsets if read(file, x, step) != CONTENT[x : x + step])

        threads = [threading.Thread(target=run, args=(UNIT_BYTES * n,)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert sorted(asked_units(server)) == list(range(UNITS))


def test_random_readers(tmp_path: Path) -> None:
    """A read at random asks for the units that it touches, and for nothing else."""
    units = random.Random(4).sample(range(0, UNITS, 3), 20)
    with reading(tmp_path / "cache") as (server, file):
        for unit in units:
            assert read(file, unit * UNIT_BYTES + 5000, 4096)
        assert asked_units(server) == units


def test_a_long_read(tmp_path: Path) -> None:
    """A read of 6 MiB is 6 requests, whichever thread is first."""
    with reading(tmp_path / "cache") as (server, file):
        assert read(file, 0, 6 << 20) == CONTENT[: 6 << 20]
        assert sorted(server.requests) == [(n << 20, ((n + 1) << 20) - 1) for n in range(6)]


def test_two_openings_share_the_cache(tmp_path: Path) -> None:
    """What one opening has fetched, another one that is open beside it does not fetch again."""
    with (
        reading(tmp_path / "cache") as (server, file),
        opened(server.url, tmp_path / "cache") as other,
    ):
        server.requests.clear()
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert read(other, 0, len(CONTENT)) == CONTENT
        assert sorted(asked_units(server)) == list(range(UNITS))


def test_read_ahead_lets_the_marked_unit_wait_for_its_reader(tmp_path: Path) -> None:
    """Read-ahead does not look again at a unit that was fetched ahead and is not ready yet.

    So what is fetched ahead depends on the reads, and not on which fetches have ended.
    """
    with reading(tmp_path / "cache") as (_server, file):
        fetcher = file.fetcher
        seen: set[int] = set()
        for unit in range(20):
            read(file, unit * UNIT_BYTES, UNIT_BYTES)
            wait_until(lambda: not fetcher._flights)
            held_back = set(fetcher._held_back)
            assert not any(fetcher.ready[each] for each in held_back)
            assert {each for each in seen if each > unit} <= held_back
            seen |= held_back
        assert len(seen) > 2
