"""Calls that may block, on the host's files: native threads make them without the GIL.

The threads belong to an optional C extension (`_iothreads.c`).  A call by one of them costs less
than half of what a call by a thread of trio costs (`qedfuse.hostio.threadcalls`).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

import outcome
import trio

from qedfuse.util.extensions import try_import_extension

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from qedfuse.hostio._iothreads import IoThreads
    from qedfuse.hostio.hostfile import Buffer

    Tag: TypeAlias = trio.lowlevel.Task | Callable[[int, int], object]
    """When the call is finished, `deliver` resumes the task or calls the function."""

_log = logging.getLogger(__name__)

MAX_THREADS: Final = 1024
"""Maximum number of native threads, and maximum number of trio's threads for an event loop.
`PosixFile` lets one file occupy at most 32, so 31 files that do not answer leave threads for
another file."""


_INTERFACE: Final = 1
"""The interface number of the extension."""

# The extension is loaded together with this module, because a mount can later cover the files of
# this program.  A server that opened such a file would wait for itself.
_extension = try_import_extension("qedfuse.hostio._iothreads", _INTERFACE)


def make_io_threads() -> IoThreads[Tag] | None:
    """Return a pool that starts a native thread when a call needs one; None without the extension.

    Raises:
        OSError: The host refused an eventfd.
    """
    if _extension is None:
        return None
    return _extension.IoThreads(MAX_THREADS)  # type: ignore[no-any-return]


class NativeCalls:
    """Makes calls in the threads of the extension; see `HostCalls` for the methods.

    A task that makes a call sleeps until `deliver` resumes it, even after a cancellation, because
    the thread uses the task's buffer.

    Attributes:
        resuming: Number of tasks that `deliver` has made runnable, but that have not run yet.
    """

    retries_reads = False
    can_start_reads = True

    def __init__(self, threads: IoThreads[Tag]) -> None:
        """Serve the tasks of the current event loop with ``threads``."""
        self._threads = threads
        self.has_finished = threads.has_finished
        """Return whether there is a finished call that `deliver` has not delivered."""
        self.resuming = 0
        trio.lowlevel.spawn_system_task(self._deliver_when_notified)

    async def _deliver_when_notified(self) -> None:
        """Deliver finished calls each time the threads have notified the event loop."""
        while True:
            await trio.lowlevel.wait_readable(self._threads.fileno())
            self.deliver()

    def deliver(self) -> None:
        """For each finished call, resume its task, or call the function in its `Tag`."""
        for tag, result, nanoseconds in self._threads.collect_finished():
            if isinstance(tag, trio.lowlevel.Task):
                self.resuming += 1
                trio.lowlevel.reschedule(tag, outcome.Value((result, nanoseconds)))
                continue
            try:
                tag(result, nanoseconds)
            except Exception:  # noqa: BLE001  the other calls must be delivered all the same
                _log.exception("internal error: the function at the end of a host call failed")

    def start_read(
        self,
        fd: int,
        offset: int,
        view: memoryview,
        answer: object,
        ended: Callable[[int, int], object],
    ) -> None:
        """Start a read in a thread, which then calls the function in ``answer`` (`HostCalls`)."""
        self._threads.submit_read(fd, offset, view, ended, answer)

    def start_export_read(
        self,
        fd: int,
        offset: int,
        view: memoryview,
        answer: object,
        ended: Callable[[int, int], object],
    ) -> None:
        """Start a read of an NBD export in a thread; see `HostCalls`."""
        self._threads.submit_export_read(fd, offset, view, ended, answer)

    # The methods below are protected from a KeyboardInterrupt between the submission of a call and
    # the sleep of its task.  Otherwise the end of the call would wake the task from a later sleep.

    @trio.lowlevel.enable_ki_protection
    async def read(self, fd: int, offset: int, view: memoryview) -> tuple[int, float]:
        """Fill ``view``; return the number of bytes and the seconds that the call took."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._threads.submit_read(fd, offset, view, trio.lowlevel.current_task())
        return await self._wait_delivered()

    @trio.lowlevel.enable_ki_protection
    async def write(self, fd: int, offset: int, parts: tuple[Buffer, ...]) -> float:
        """Write all of ``parts``; return how many seconds that took."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._threads.submit_write(fd, offset, parts, trio.lowlevel.current_task())
        return (await self._wait_delivered())[1]

    @trio.lowlevel.enable_ki_protection
    async def datasync(self, fd: int) -> None:
        """Call fdatasync(2)."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._threads.submit_datasync(fd, trio.lowlevel.current_task())
        await self._wait_delivered()

    @trio.lowlevel.enable_ki_protection
    async def truncate(self, fd: int, size: int) -> None:
        """Call ftruncate(2)."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._threads.submit_truncate(fd, size, trio.lowlevel.current_task())
        await self._wait_delivered()

    @trio.lowlevel.enable_ki_protection
    async def fallocate(self, fd: int, mode: int, *ranges: tuple[int, int]) -> None:
        """Change how ranges of a file are stored (fallocate(2))."""
        await trio.lowlevel.checkpoint_if_cancelled()
        for offset, length in ranges:
            self._threads.submit_fallocate(fd, mode, offset, length, trio.lowlevel.current_task())
            await self._wait_delivered()

    async def _wait_delivered(self) -> tuple[int, float]:
        """Sleep until the call of this task is delivered; return its result and its seconds."""
        finished: Any = await trio.lowlevel.wait_task_rescheduled(_refuse_to_abort)
        self.resuming -= 1
        result, nanoseconds = finished
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result, nanoseconds / 1e9


def _refuse_to_abort(_: object) -> trio.lowlevel.Abort:
    """Refuse to wake a cancelled task, which must sleep until its call is delivered."""
    return trio.lowlevel.Abort.FAILED
