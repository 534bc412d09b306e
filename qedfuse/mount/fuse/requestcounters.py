"""Counters of the requests to one disk: how many, how many bytes, how many failed, how long.

The extension and the Python code count in the same array, each request once.

The time of a request is the time from its receipt until its answer.  The extension times only one
in 16 of the requests that it answers without waiting.  That time counts for the following 15 such
requests as well.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from types import TracebackType

OPERATIONS: Final = ("read", "write", "flush", "discard")
"""The operations that are counted; `READ` and so on are their indices."""
READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 2
"""An fsync(2) of the mounted file; a loop device sends one for each flush."""
DISCARD: Final = 3
"""An fallocate(2) that discards or zeroes a range; a loop device sends one for each discard."""

BUCKETS: Final = 27
"""Number of buckets of a histogram.  Bucket 0 counts the times below 1 microsecond, and bucket n
the times from 2**(n-1) to below 2**n microseconds.  The last bucket has no upper limit."""

# The cells of one operation; ``_counters.c`` has the same numbers.
_REQUESTS: Final = 0
_BYTES: Final = 1
_ERRORS: Final = 2
_FAST: Final = 3
_NANOSECONDS: Final = 4
_HISTOGRAM: Final = 5
_CELLS_PER_OPERATION: Final = _HISTOGRAM + BUCKETS

_NANOSECONDS_PER_MICROSECOND: Final = 1000
_NANOSECONDS_PER_SECOND: Final = 1e9


@dataclass(frozen=True, slots=True)
class OperationStatistics:
    """The counters of one operation since the mount began.

    Attributes:
        requests: Requests that have been answered, those answered with an error included.
        bytes: Bytes that successful requests have read, written or discarded.
        errors: Requests that were answered with an error.
        fast: Requests that were answered without waiting.
        seconds: The sum of the times that the requests took.
        histogram: The number of requests in each of the `BUCKETS` buckets of times.
    """

    requests: int
    bytes: int
    errors: int
    fast: int
    seconds: float
    histogram: tuple[int, ...]


class RequestCounters:
    """The counters of one disk.

    Attributes:
        cells: The counters, in which the extension counts as well.
    """

    __slots__ = ("cells",)

    def __init__(self) -> None:
        """Start with zeros."""
        self.cells = array("Q", bytes(8 * _CELLS_PER_OPERATION * len(OPERATIONS)))

    def count(self, operation: int, size: int, start: int, *, is_fast: bool = False) -> None:
        """Count a request that was answered without an error.

        Args:
            operation: `READ`, `WRITE`, `FLUSH` or `DISCARD`.
            size: The length of the request in bytes.
            start: When the request began, as `time.perf_counter_ns` returned it.
            is_fast: Whether the request was answered without waiting.
        """
        at = operation * _CELLS_PER_OPERATION
        self.cells[at + _BYTES] += size
        self.cells[at + _FAST] += is_fast
        self._add(at, time.perf_counter_ns() - start)

    def count_error(self, operation: int, start: int) -> None:
        """Count a request that was answered with an error; the arguments are those of `count`."""
        at = operation * _CELLS_PER_OPERATION
        self.cells[at + _ERRORS] += 1
        self._add(at, time.perf_counter_ns() - start)

    def _add(self, at: int, nanoseconds: int) -> None:
        """Add a request to the operation whose cells begin at index ``at``."""
        bucket = (nanoseconds // _NANOSECONDS_PER_MICROSECOND).bit_length()
        self.cells[at + _REQUESTS] += 1
        self.cells[at + _NANOSECONDS] += nanoseconds
        self.cells[at + _HISTOGRAM + min(bucket, BUCKETS - 1)] += 1

    def counted(self, operation: int, size: int = 0) -> CountedRequest:
        """Return a context manager that counts a request at the end of its block.

        An `Exception` that leaves the block is counted as an error.  The time of the request begins
        with this call.
        """
        return CountedRequest(self, operation, size)

    def statistics(self, operation: int) -> OperationStatistics:
        """Return what was counted of an operation so far."""
        at = operation * _CELLS_PER_OPERATION
        cells = self.cells[at : at + _CELLS_PER_OPERATION]
        return OperationStatistics(
            requests=cells[_REQUESTS],
            bytes=cells[_BYTES],
            errors=cells[_ERRORS],
            fast=cells[_FAST],
            seconds=cells[_NANOSECONDS] / _NANOSECONDS_PER_SECOND,
            histogram=tuple(cells[_HISTOGRAM:]),
        )


class CountedRequest:
    """One request that may wait, from its beginning to its answer.

    Attributes:
        size: The length of the request in bytes; code in the block can change this value.
    """

    __slots__ = ("_counters", "_operation", "_start", "size")

    def __init__(self, counters: RequestCounters, operation: int, size: int) -> None:
        self._counters = counters
        self._operation = operation
        self._start = time.perf_counter_ns()
        self.size = size

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Count the request, unless its task was cancelled."""
        if kind is None:
            self._counters.count(self._operation, self.size, self._start)
        elif isinstance(error, Exception):
            self._counters.count_error(self._operation, self._start)


class SharedCells(NamedTuple):
    """The counters of all files of a mount, in which the extension counts.

    Attributes:
        first_inode: The inode number of the first file; the other files have the next numbers.
        cells: `RequestCounters.cells` of each file, in the order of the inode numbers.
    """

    first_inode: int
    cells: tuple[array[int], ...]
