"""A trio event loop in a thread, for tests that are not async.

hypothesis drives a state machine by plain calls, while a disk lives in a nursery.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")
Args = TypeVarTuple("Args")


class EventLoopThread:
    """Runs async functions for synchronous callers, in one event loop in a thread.

    Background tasks keep running between the calls.
    """

    def __init__(self) -> None:
        """Start the thread, and wait until its event loop runs."""
        ready: SimpleQueue[tuple[trio.lowlevel.TrioToken, trio.Event]] = SimpleQueue()

        async def main() -> None:
            stop = trio.Event()
            ready.put((trio.lowlevel.current_trio_token(), stop))
            await stop.wait()

        self._thread = threading.Thread(target=trio.run, args=(main,))
        self._thread.start()
        self._token, self._stop = ready.get()

    def run(self, function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Call an async function in the event loop; return its result, or raise its exception."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def stop(self) -> None:
        """End the event loop and join the thread."""
        self._token.run_sync_soon(self._stop.set)
        self._thread.join()


class HeldContext:
    """An async context manager that a task holds open between synchronous calls.

    Attributes:
        value: The result of entering it.
    """

    def __init__(self, loop: EventLoopThread, manager: AbstractAsyncContextManager[Any]) -> None:
        """Enter ``manager`` in the event loop; raise what that raises."""
        self._loop = loop
        self._manager = manager
        self._leave = trio.Event()
        self._done = trio.Event()
        self._error: BaseException | None = None
        self.value: Any = None
        loop.run(self._start)

    async def _start(self) -> None:
        entered = trio.Event()
        trio.lowlevel.spawn_system_task(self._hold, entered)
        await entered.wait()
        if self._error is not None:
            raise self._error

    async def _hold(self, entered: trio.Event) -> None:
        try:
            async with self._manager as self.value:
                entered.set()
                await self._leave.wait()
        except BaseException as error:  # noqa: BLE001  raised by `leave`
            self._error = error
        finally:
            entered.set()
            self._done.set()

    def leave(self) -> None:
        """Leave the context; raise what that raises."""
        self._loop.run(self._finish)

    async def _finish(self) -> None:
        self._leave.set()
        await self._done.wait()
        if self._error is not None:
            raise self._error
