"""A lock without fairness: a task that has released the lock can take it before the waiters.

The tasks of pyfuse3 read requests from the kernel under a lock.  With trio's lock, which is handed
over to the next waiter, each request would cost a switch of tasks.  With this lock the same task
takes the next request, as long as it answers requests without waiting.
"""

from __future__ import annotations

import trio


class UnfairLock:
    """A lock that a task can acquire before the tasks that already wait for it ("barging").

    A task that acquires a free lock does not yield to other tasks.  Releasing the lock wakes the
    task that began to wait last, because its memory is still in the processor's caches.  The woken
    task gets the lock only if the lock is still free when the task runs.
    """

    def __init__(self) -> None:
        """Make a lock that is free."""
        self._held = False
        self._waiting: list[trio.lowlevel.Task] = []
        self._woken = False

    async def __aenter__(self) -> None:
        """Acquire the lock; wait while another task holds the lock."""
        while self._held:
            await self._wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        """Release the lock; wake one waiter if the last woken one has run."""
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self) -> None:
        """Sleep until the lock has been released; another task may hold the lock again by then."""
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        # trio does not cancel a task between its rescheduling and its next run.  So a woken
        # waiter always clears `_woken`, and the next release of the lock wakes another waiter.
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = False
