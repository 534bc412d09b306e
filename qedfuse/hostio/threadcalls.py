"""Calls that may block, on the host's files: trio's worker threads make them.

`ThreadCalls` implements `qedfuse.hostio.hostcalls.HostCalls` without the C extension.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import fallocate, read_all, write_all
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer

Args = TypeVarTuple("Args")
T = TypeVar("T")


class ThreadCalls:
    """Makes calls in the threads of `trio.to_thread`; see `HostCalls` for the methods."""

    retries_reads = True
    can_start_reads = False
    resuming = 0

    def has_finished(self) -> bool:
        """Return False: trio itself resumes the tasks."""
        return False

    def deliver(self) -> None:
        """Do nothing: trio itself resumes the tasks."""

    def start_read(self, *_: object) -> None:
        """Raise NotImplementedError: a thread of trio cannot answer a request by a C function."""
        raise NotImplementedError

    def start_export_read(self, *_: object) -> None:
        """Raise NotImplementedError, as `start_read` does."""
        raise NotImplementedError

    async def read(self, fd: int, offset: int, view: memoryview) -> tuple[int, float]:
        """Fill ``view``; return the number of bytes and the seconds that the call took."""
        return await _in_thread(_read, fd, offset, view)

    async def write(self, fd: int, offset: int, parts: tuple[Buffer, ...]) -> float:
        """Write all of ``parts``; return how many seconds that took."""
        return await _in_thread(write_all, fd, offset, parts)

    async def datasync(self, fd: int) -> None:
        """Call fdatasync(2)."""
        await _in_thread(os.fdatasync, fd)

    async def truncate(self, fd: int, size: int) -> None:
        """Call ftruncate(2)."""
        await _in_thread(os.ftruncate, fd, size)

    async def fallocate(self, fd: int, mode: int, *ranges: tuple[int, int]) -> None:
        """Change how ranges of a file are stored (fallocate(2))."""
        await _in_thread(_fallocate, fd, mode, ranges)


async def _in_thread(function: Callable[[*Args], T], *args: *Args) -> T:
    """Call a function in a thread; return its result, or raise OSError."""
    try:
        return await run_in_thread(function, *args)
    except HostError as error:
        raise OSError(error.errno, str(error)) from error


def _read(fd: int, offset: int, view: memoryview) -> tuple[int, float]:
    """Call `read_all`; return the number of bytes and how many seconds that took."""
    since = time.perf_counter()
    return read_all(fd, offset, view), time.perf_counter() - since


def _fallocate(fd: int, mode: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """Call fallocate(2) for each range."""
    for offset, length in ranges:
        fallocate(fd, mode, offset, length)
