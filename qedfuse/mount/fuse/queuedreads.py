"""Reads in a queue of the kernel (io_uring): the Python part.

A short read whose data is not in the host's page cache waits in this queue, if the tables for its
range are in memory (``_queuedread.c``).  While `Scheduler` polls for requests, it also answers
reads that have ended.  When the event loop sleeps instead, the end of a read makes a descriptor
readable, and a task of this module answers the read.

Threads make these reads if the kernel is older than Linux 6.1 or does not permit io_uring, if the C
extension is missing, or if the user chooses threads (`HOST_CALLS_VARIABLE`).
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE, NATIVE, THREADS
from qedfuse.mount.fuse import extraops

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.mount.fuse.extraops import SlowAnswer

_log = logging.getLogger(__name__)

_SLOW_SECONDS: Final = 8e-3
"""If passing reads to the kernel takes longer because the event loop has slept, it has waited for
the host's disk.  Then threads make the reads of the next second."""
_MAX_WAIT_SECONDS: Final = 0.02
"""Time after which `_EndedReads.wait_for_all` looks again whether reads are in the queue."""


@asynccontextmanager
async def queued_reads(answer_slowly: SlowAnswer) -> AsyncIterator[None]:
    """Let reads wait in a queue of the kernel during the block, if there can be a queue.

    The end of the block waits until the kernel has made all queued reads, because the reads use the
    descriptors of the disks.  A cancellation does not end this wait, and no request may arrive
    during it.  ``answer_slowly`` answers a read that has failed in the queue.
    """
    fd = _open(answer_slowly)
    if fd is None:
        yield
        return
    ended_reads = _EndedReads(fd)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await ended_reads.wait_for_all()
            await ended_reads.stop()
        extraops.close_read_queue()


def _open(answer_slowly: SlowAnswer) -> int | None:
    """Make the queue; return its descriptor, or None if no queue is wanted or possible."""
    if os.environ.get(HOST_CALLS_VARIABLE) in (THREADS, NATIVE):
        return None
    try:
        return extraops.open_read_queue(answer_slowly, _SLOW_SECONDS)
    except (OSError, RuntimeError) as error:
        _log.debug("no queue for reads: %s", error)
        return None


class _EndedReads:
    """Answers queued reads that have ended; the end of a read wakes the event loop if it sleeps."""

    def __init__(self, fd: int) -> None:
        """Start a task that answers the reads of the queue whose descriptor is ``fd``."""
        self._fd = fd
        self._ended = trio.Event()
        self._stopping = trio.Event()
        self._stopped = trio.Event()
        # A task of a nursery could be cancelled before the last read has ended.
        trio.lowlevel.spawn_system_task(self._answer_when_notified)

    async def _answer_when_notified(self) -> None:
        """Answer reads that have ended, until `stop` is called."""
        try:
            # `stop` may have been called before the task ran for the first time.
            while not self._stopping.is_set():
                await trio.lowlevel.wait_readable(self._fd)
                if self._stopping.is_set():
                    break
                # The descriptor must be emptied, or it would stay readable.  `end_queued_reads`
                # does this only if a read is in the queue, but `Scheduler` may have answered the
                # read already.
                with suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
                extraops.end_queued_reads()
                self._ended.set()
                self._ended = trio.Event()
        except trio.ClosedResourceError:
            pass
        finally:
            self._stopped.set()

    async def wait_for_all(self) -> None:
        """Wait until no read is in the queue."""
        while extraops.queued_reads():
            # A flush asks whether requests wait (`LoopLoad.has_requests`), and then `Scheduler` may
            # answer the last read and empty the descriptor.  Then the event is not set.
            with trio.move_on_after(_MAX_WAIT_SECONDS):
                await self._ended.wait()
            extraops.end_queued_reads()  # even if the task has failed

    async def stop(self) -> None:
        """End the task, which may just have been woken; then the descriptor can be closed."""
        self._stopping.set()
        trio.lowlevel.notify_closing(self._fd)
        await self._stopped.wait()
