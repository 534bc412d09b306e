"""A door for plain synchronous code into something that lives in a trio event loop.

    with closing(Portal(open_something(...), "something")) as portal:
        answer = portal.call(portal.value.ask, "what")

Each portal has a thread with an event loop of its own, in which an async context manager
is open.  How it ends, in each case:

- `close` lets the calls under way finish, leaves the context manager and waits for that.
- A portal that is still open when the program ends is closed then: Python waits for the
  thread, and a watcher makes it end once the main thread and all other threads of the
  program are done.  (``atexit`` would be too late: since Python 3.12 its functions cannot
  start threads any more, and closing a file may need one to wait for the disk.)
- After ``os.fork`` the child has no thread to talk to; there every call fails at once.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Args = TypeVarTuple("Args")


class PortalClosedError(RuntimeError):
    """The portal's event loop does not run any more, or not in this process."""


class Portal(Generic[T]):
    """An async context manager, open in a thread of its own until `close`.

    Attributes:
        value: What the context manager gave.
    """

    value: T

    def __init__(self, manager: AbstractAsyncContextManager[T], name: str) -> None:
        """Start a thread called ``name`` and enter ``manager`` in it.

        Raises whatever entering it raises; then the thread has ended.
        """
        self._opened: Future[T] = Future()
        self._pending: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._wanted = True
        self._attended = False  # somebody waits in close
        self._unattended = False  # nobody did when leaving began
        self._closing = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        # Not a daemon: Python must wait until what is open has been closed.
        self._thread = _PortalThread(target=self._run, args=(manager,), name=name, daemon=False)
        _watcher.watch(self)
        self._thread.start()
        try:
            self.value = self._opened.result()
        except BaseException:
            # The error of the manager, or a KeyboardInterrupt while it was entered.
            self.ask_to_close()
            self._thread.join()
            raise

    def is_alive(self) -> bool:
        """Tell whether there is a thread to talk to; there is none in a forked child."""
        return self._thread.is_alive()

    def call(self, function: Callable[[*Args], Awaitable[R]], *args: *Args) -> R:
        """Run an async function in the event loop; give its result or raise its error.

        An interrupted caller (KeyboardInterrupt) does not stop the function.

        Raises:
            PortalClosedError: There is no event loop to run it in.
        """
        future: Future[R] = Future()
        # Noted before it is queued: whoever ends the loop fails what is noted (_run).
        self._pending.add(future)
        try:
            if self._token is None or not self.is_alive():
                raise _closed()
            try:
                self._token.run_sync_soon(self._start, future, partial(function, *args))
            except trio.RunFinishedError:
                raise _closed() from None
            return future.result()
        finally:
            self._pending.discard(future)
            del future  # it refers to an error whose traceback refers to this frame

    def close(self) -> None:
        """Leave the context manager and wait until the thread has ended.

        Raises what leaving raised, the first time; closing again does nothing.
        """
        self._attended = True
        self.ask_to_close()
        self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def ask_to_close(self) -> None:
        """Have it closed soon, without waiting; whatever goes wrong then is logged.

        Unlike `close` this is safe in a finalizer, which may run in the very thread
        that it would have to wait for.
        """
        self._wanted = False
        if self._token is not None and self.is_alive():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._closing.set)

    def _run(self, manager: AbstractAsyncContextManager[T]) -> None:
        """Run the event loop; this is the thread's whole life."""
        try:
            trio.run(self._serve, manager)
        except BaseException as error:  # noqa: BLE001  handed to whoever opens or closes
            if self._opened.done():
                self._failure = error
                if self._unattended:
                    # Nobody may ever ask for it; then at least the log has it.
                    _log.error("%s: %s", self._thread.name, error)
            else:
                self._opened.set_exception(error)
        finally:
            # Nobody can be waiting for these in vain: calls that come later find the
            # loop finished.
            for future in list(self._pending):
                if not future.done():
                    future.set_exception(_closed())
            _watcher.forget(self)

    async def _serve(self, manager: AbstractAsyncContextManager[T]) -> None:
        """Keep the context manager open until it is to be closed."""
        # First the token, then the look at _wanted; ask_to_close does it the other way
        # round, so that one of the two sees the other.
        self._token = trio.lowlevel.current_trio_token()
        async with manager as value, trio.open_nursery() as nursery:
            self._nursery = nursery
            self._opened.set_result(value)
            try:
                if self._wanted:
                    await self._closing.wait()
            finally:
                self._unattended = not self._attended
                # From here on no call starts.  Those under way finish before the manager
                # is left, or are cancelled if it has broken down.
                self._nursery = None

    def _start(self, future: Future[R], function: Callable[[], Awaitable[R]]) -> None:
        """Start a call; runs in the event loop."""
        if self._nursery is None:
            future.set_exception(_closed())
        else:
            self._nursery.start_soon(_carry_out, future, function)


async def _carry_out(future: Future[R], function: Callable[[], Awaitable[R]]) -> None:
    """Run one call and hand its outcome over."""
    try:
        result = await function()
    except trio.Cancelled:
        future.set_exception(_closed())
        raise
    except Exception as error:  # noqa: BLE001  the caller's, not ours
        future.set_exception(error)
    else:
        future.set_result(result)


def _closed() -> PortalClosedError:
    return PortalClosedError("the event loop that this call needs has ended")


class _PortalThread(threading.Thread):
    """A portal's thread, told apart from the program's own."""


class _Watcher:
    """Closes the portals that are still open when the program ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._portals: set[Portal[Any]] = set()
        self._thread: threading.Thread | None = None

    def watch(self, portal: Portal[Any]) -> None:
        """Take care of a portal."""
        with self._lock:
            self._portals.add(portal)
            # One thread for all portals; after a fork it is gone from the child.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="portals", daemon=True)
                self._thread.start()

    def forget(self, portal: Portal[Any]) -> None:
        """Take care of a portal no longer; it has ended."""
        with self._lock:
            self._portals.discard(portal)

    def _run(self) -> None:
        """Wait for the end of the program, then have closed what is open."""
        threading.main_thread().join()
        # Threads that Python waits for may still use a portal.
        while users := [
            thread
            for thread in threading.enumerate()
            if thread.is_alive() and not thread.daemon and not isinstance(thread, _PortalThread)
        ]:
            for thread in users:
                thread.join()
        with self._lock:
            portals = list(self._portals)
        for portal in portals:
            portal.ask_to_close()


_watcher: Final = _Watcher()
