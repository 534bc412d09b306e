"""A blocking portal: synchronous code calls async functions in the portal's own event loop.

    with closing(Portal(open_something(...), "something")) as portal:
        answer = portal.call(portal.value.ask, "what")

Each portal has a thread with a trio event loop, in which an async context manager is open.  If a
background task of the context manager fails, running calls are cancelled, and the context manager
is left.

A portal that is still open when the program ends is closed by a watcher thread, after all threads
of the program except daemons have ended.  A function of ``atexit`` would run too late: since Python
3.12 it cannot start threads, and closing a file can need a new thread.

After ``os.fork`` every call in the child process fails immediately.  In the parent process the
portal stays open.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, TypeVarTuple

import trio

from qedfuse.util.threads import start, start_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Args = TypeVarTuple("Args")


class PortalClosedError(RuntimeError):
    """The portal is closing or closed, or its event loop runs in another process."""


class Portal(Generic[T]):
    """An async context manager, open in a thread of its own until the portal ends.

    Attributes:
        value: The value that entering the context manager returned.
    """

    value: T

    def __init__(
        self,
        manager: AbstractAsyncContextManager[T],
        name: str,
        *,
        before_leaving: Callable[[T], object] = lambda _: None,
    ) -> None:
        """Start a thread and enter a context manager in it.

        Args:
            manager: The context manager.
            name: The name of the thread.
            before_leaving: Called in the event loop with ``value`` when leaving begins.

        Raises:
            OSError: The host cannot start a thread.
            BaseException: The error of entering ``manager``, or a KeyboardInterrupt meanwhile.  The
                thread has ended.
        """
        self._before_leaving = before_leaving
        self._opened: Future[T] = Future()
        self._pending: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._close_requested = False  # set by `ask_to_close`, which `close` calls too
        self._close_called = False  # set only by `close`
        self._log_failure = False  # True if leaving began before `close` was called
        self._closing = trio.Event()
        # The scope of the whole event loop, cancelled only while `_opened` is not done.
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        # Not a daemon, because Python must wait until the context manager has been left.
        self._thread = _PortalThread(target=self._run, args=(manager,), name=name, daemon=False)
        _watcher.watch(self)
        try:
            start(self._thread)
        except OSError:
            _watcher.forget(self)
            raise
        try:
            self.value = self._opened.result()
        except BaseException:
            # Entering has failed, or a KeyboardInterrupt has interrupted the wait.
            self.ask_to_close()
            self._thread.join()
            raise

    def is_alive(self) -> bool:
        """Return whether the portal's thread runs in this process; False in a forked child."""
        return self._thread.is_alive()

    def call(self, function: Callable[[*Args], Awaitable[R]], *args: *Args) -> R:
        """Run an async function in the event loop; return its result or raise its error.

        The portal's own thread must not call this method, because it would wait for itself.  After
        a KeyboardInterrupt in the caller, ``function`` runs on.

        Raises:
            PortalClosedError: The portal is closing or closed, runs in another process, or failed
                during the call.  In the last case ``function`` may have been cancelled.
        """
        future: Future[R] = Future()
        # Record the future before the call is queued: when the loop ends, `_run` fails all recorded
        # futures, so no caller waits forever.
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
            del future  # breaks a cycle: future -> error -> traceback -> this frame

    def raise_failure(self) -> None:
        """Raise PortalClosedError if the event loop has failed; do nothing after `close`."""
        if self._failure is not None:
            raise _closed() from self._failure

    def close(self) -> None:
        """Leave the context manager and wait until the thread has ended.

        A second call does nothing.  The portal's own thread must not call this method, because it
        would wait for itself.

        Raises:
            BaseException: The error of the context manager or of one of its background tasks;
                raised only once.
        """
        self._close_called = True
        self.ask_to_close()
        self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the event loop, and do not wait for it.

        Nothing is called if the event loop has ended.  The function must not raise.
        """
        if self._token is not None and self.is_alive():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)

    def ask_to_close(self) -> None:
        """Start to close the portal, and return without waiting until it is closed.

        If the context manager is still being entered, entering is cancelled.  `close` raises the
        error if leaving fails.  If leaving began before `close` was called, the error is also
        logged.  A finalizer, which Python can run in the portal's own thread, may call this method,
        but not `close`.
        """
        self._close_requested = True
        self.call_soon(self._begin_closing)

    def _begin_closing(self) -> None:
        """End `_serve`.  Runs in the event loop."""
        if self._opened.done():
            self._closing.set()
        else:
            self._scope.cancel()

    def _run(self, manager: AbstractAsyncContextManager[T]) -> None:
        """Run the event loop; the thread ends with it."""
        try:
            trio.run(self._serve, manager)
        except BaseException as error:  # noqa: BLE001  raised by the constructor or by close
            if self._opened.done():
                self._failure = error
                if self._log_failure:
                    # The caller may never call `close`.
                    _log.error("%s: %s", self._thread.name, error)
            else:
                self._opened.set_exception(error)
        finally:
            # Fail the calls that the loop has not run.  Later calls find that the loop has ended.
            for future in list(self._pending):
                if not future.done():
                    future.set_exception(_closed())
            _watcher.forget(self)

    async def _serve(self, manager: AbstractAsyncContextManager[T]) -> None:
        """Keep the context manager open until closing is requested."""
        # `_serve` sets the token before it reads `_close_requested`.  `ask_to_close` sets
        # `_close_requested` before it reads the token.  So at least one of the two sees what
        # the other has set, and the request is not lost.
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            if self._close_requested:
                self._scope.cancel()
            async with manager as value, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._opened.set_result(value)
                try:
                    if not self._close_requested:
                        await self._closing.wait()
                finally:
                    self._log_failure = not self._close_called
                    # No call starts from here on.  The nursery waits for the running calls
                    # before the context manager is left.  If the wait for `_closing` has
                    # raised, the nursery cancels the running calls first.
                    self._nursery = None
                    self._before_leaving(value)
        if not self._opened.done():
            raise _closed()

    def _start(self, future: Future[R], function: Callable[[], Awaitable[R]]) -> None:
        """Start a call, or fail its future if the portal is closing.  Runs in the event loop."""
        if self._nursery is None:
            future.set_exception(_closed())
        else:
            self._nursery.start_soon(_carry_out, future, function)


async def _carry_out(future: Future[R], function: Callable[[], Awaitable[R]]) -> None:
    """Run one call and store its result or its error in ``future``."""
    try:
        result = await function()
    except trio.Cancelled:
        future.set_exception(_closed())
        raise
    except Exception as error:  # noqa: BLE001  raised in the caller
        future.set_exception(error)
    else:
        future.set_result(result)


def _closed() -> PortalClosedError:
    return PortalClosedError(
        "the event loop that the call needs is ending, has ended, or runs in another process"
    )


class _PortalThread(threading.Thread):
    """The thread of a portal, as distinct from the program's own threads."""


class _Watcher:
    """Closes the portals that are still open when the program ends."""

    def __init__(self) -> None:
        self._reset()
        # If another thread held the lock during a fork, the lock would stay locked in the child.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Watch no portal; in a forked child, the parent's portals have no threads."""
        self._lock = threading.Lock()
        self._portals: set[Portal[Any]] = set()
        self._thread: threading.Thread | None = None

    def watch(self, portal: Portal[Any]) -> None:
        """Arrange that ``portal`` is closed when the program ends, if it is still open then."""
        with self._lock:
            # One thread watches all portals.
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread(self._run, name="portals")
            self._portals.add(portal)

    def forget(self, portal: Portal[Any]) -> None:
        """Stop watching a portal that has ended."""
        with self._lock:
            self._portals.discard(portal)

    def _run(self) -> None:
        """Wait for the end of the program, then close the portals that are open."""
        threading.main_thread().join()
        # Wait for all threads but daemons, as Python itself does: they may still use a portal.
        # The threads of portals end only when the portals are closed.
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
