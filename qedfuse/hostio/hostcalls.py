"""Calls on the host's files that may block, as async functions.

While such a call waits for the host's disk, or for the lock of an inode, the event loop serves
other requests.  A native thread (`NativeCalls`) makes the call, or a thread of trio (`ThreadCalls`)
if the C extension was not built or ``QEDFUSE_HOST_CALLS`` is ``threads``.

For short reads a mount has a third way, io_uring (``mount/fuse/_queuedread.c``), unless the
variable is ``threads`` or ``native``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

import trio

from qedfuse.hostio.nativecalls import MAX_THREADS, NativeCalls, make_io_threads
from qedfuse.hostio.threadcalls import ThreadCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer

HOST_CALLS_VARIABLE: Final = "QEDFUSE_HOST_CALLS"
"""Name of the environment variable."""
THREADS: Final = "threads"
"""Value: threads of trio make all calls."""
NATIVE: Final = "native"
"""Value: io_uring is not used, so native threads also make a mount's short reads."""


class HostCalls(Protocol):
    """Makes calls on open descriptors of regular files, for the tasks of one event loop.

    Each async method returns when the call has ended, even if the task is cancelled during the
    call.  Offsets, lengths and sizes are in bytes.

    Raises:
        OSError: The kernel refused, or no thread could make the call.
    """

    @property
    def retries_reads(self) -> bool:
        """Whether a read that misses the page cache is retried before a thread makes it."""

    @property
    def can_start_reads(self) -> bool:
        """Whether `start_read` and `start_export_read` can be used."""

    @property
    def resuming(self) -> int:
        """Number of tasks that `deliver` has made runnable, but that have not run yet."""

    def has_finished(self) -> bool:
        """Return whether there is a finished call that `deliver` has not delivered."""

    def deliver(self) -> None:
        """Resume the tasks whose calls are finished, and call ``ended`` of finished reads.

        The event loop does the same when it next looks for events.  So a task that does not let the
        event loop run, because it polls, should call this method.
        """

    def start_read(
        self,
        fd: int,
        offset: int,
        view: memoryview,
        answer: object,
        ended: Callable[[int, int], object],
    ) -> None:
        """Start a read in a thread, which then calls the C function in ``answer``.

        Args:
            fd: The descriptor, which must stay open until ``ended`` is called.
            offset: File offset.
            view: The buffer, which must not change before the C function has returned.
            answer: A capsule with the C function that the thread calls at the end of the read;
                see ``_iothreads.c``.
            ended: Called in the event loop with the number of bytes read, or a negative errno,
                and with the nanoseconds that the system call took.
        """

    def start_export_read(
        self,
        fd: int,
        offset: int,
        view: memoryview,
        answer: object,
        ended: Callable[[int, int], object],
    ) -> None:
        """Start a read of an NBD export in a thread.

        Args:
            fd: A connection that no other thread uses, and on which the server sends simple
                replies.  After a failed read it must not be used again.
            offset: Offset in the export.
            view: See `start_read`.
            answer: See `start_read`.
            ended: See `start_read`.
        """

    async def read(self, fd: int, offset: int, view: memoryview) -> tuple[int, float]:
        """Fill ``view`` from a file offset, as far as the file reaches.

        Returns:
            The number of bytes read, less than the length of ``view`` only if the file ends
            earlier; and the seconds that the system call took.
        """

    async def write(self, fd: int, offset: int, parts: tuple[Buffer, ...]) -> float:
        """Write all of ``parts`` at a file offset; return how many seconds that took."""

    async def datasync(self, fd: int) -> None:
        """Call fdatasync(2)."""

    async def truncate(self, fd: int, size: int) -> None:
        """Call ftruncate(2)."""

    async def fallocate(self, fd: int, mode: int, *ranges: tuple[int, int]) -> None:
        """Change how ranges of a file are stored (fallocate(2)); stop at the first error.

        Each range is an offset and a length.
        """


_calls: Final = trio.lowlevel.RunVar[HostCalls]("host_calls")


def host_calls() -> HostCalls:
    """Return the object that makes the calls of the current event loop.

    Raises:
        OSError: This is the first call in the event loop, and the host refused an eventfd.
    """
    try:
        return _calls.get()
    except LookupError:
        calls = make_host_calls(os.environ.get(HOST_CALLS_VARIABLE))
        _calls.set(calls)
        # Threads of trio make some calls, such as searches for holes, even if there are native
        # threads.  `PosixFile` lets the calls on one file occupy up to 32 threads.  So two files
        # whose disks do not answer would occupy all 40 threads that trio allows by default.
        limiter = trio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = max(limiter.total_tokens, MAX_THREADS)
        return calls


def make_host_calls(choice: str | None) -> HostCalls:
    """Return `NativeCalls`; or `ThreadCalls` if ``choice`` is `THREADS` or there is no extension.

    Raises:
        OSError: The host refused an eventfd.
    """
    threads = None if choice == THREADS else make_io_threads()
    return ThreadCalls() if threads is None else NativeCalls(threads)
