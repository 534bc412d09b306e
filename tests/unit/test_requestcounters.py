"""Counting requests: what counts, as what, and in which bucket."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.disk.lookup.filereads import FileReads
from qedfuse.mount.fuse.requestcounters import (
    BUCKETS,
    DISCARD,
    FLUSH,
    READ,
    WRITE,
    OperationStatistics,
    RequestCounters,
)

if TYPE_CHECKING:
    from typing import Any

MICROSECOND = 1000
NOW = 10**18


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock."""
    monkeypatch.setattr(time, "perf_counter_ns", lambda: NOW)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("microseconds", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1 << 24, 25), ((1 << 25), 26), (1 << 40, 26)],
)
def test_bucket_n_has_the_times_below_a_power_of_two(microseconds: int, bucket: int) -> None:
    """Bucket n counts from 2**(n-1) up to 2**n microseconds, and the last one all longer times."""
    counters = RequestCounters()
    counters.count(READ, 8, NOW - microseconds * MICROSECOND)
    found = counters.statistics(READ)
    assert found.histogram == tuple(int(at == bucket) for at in range(BUCKETS))
    assert found.seconds == microseconds / 1e6


@pytest.mark.usefixtures("clock")
def test_operations_are_counted_apart() -> None:
    """Each operation has its own cells; an error counts as a request, without its bytes."""
    counters = RequestCounters()
    counters.count(WRITE, 4096, NOW - 5 * MICROSECOND, is_fast=True)
    counters.count(WRITE, 512, NOW)
    counters.count_error(WRITE, NOW - MICROSECOND)
    found = counters.statistics(WRITE)
    assert (found.requests, found.bytes, found.errors, found.fast) == (3, 4608, 1, 1)
    assert sum(found.histogram) == 3
    nothing = OperationStatistics(0, 0, 0, 0, 0.0, (0,) * BUCKETS)
    assert {counters.statistics(other) for other in (READ, FLUSH, DISCARD)} == {nothing}


def test_a_block_that_raises_counts_as_an_error() -> None:
    """The block counts a success with the size that it has set, and an exception as an error."""
    counters = RequestCounters()
    with counters.counted(READ) as request:
        request.size = 7
    with pytest.raises(ValueError, match="invalid literal"), counters.counted(READ, 100):
        int("host")
    found = counters.statistics(READ)
    assert (found.requests, found.bytes, found.errors) == (2, 7, 1)


async def test_a_cancelled_request_does_not_count() -> None:
    """A request whose task is cancelled has no answer."""
    counters = RequestCounters()
    with trio.CancelScope() as scope:
        scope.cancel()
        with counters.counted(FLUSH):
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert counters.statistics(FLUSH).requests == 0


def test_reads_are_counted_for_their_file() -> None:
    """Reads of each file of the chain are counted by its depth."""
    files: list[Any] = [object(), object()]
    reads = FileReads(files)
    reads.count(files[1], 100)
    reads.count(files[1], 20)
    reads.count(files[0], 3)
    assert reads.statistics() == [(1, 3), (2, 120)]
