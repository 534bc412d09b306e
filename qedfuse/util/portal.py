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

An exception of a signal handler, such as KeyboardInterrupt, can end the wait for a call or for the
end of a portal at any point.  Other waits of Python can then leave a lock of theirs taken, so these
waits use a `Latch`.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, TypeVarTuple

import trio

from qedfuse.util.latch import Latch, Outcome
from qedfuse.util.portalcall import Call, LoggedCall, PortalClosedError, closed_error
from qedfuse.util.portalthreads import PortalThread, in_portal_thread, serves_portal, watcher
from qedfuse.util.threads import start

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Args = TypeVarTuple("Args")


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
            BaseException: The error of entering ``manager``, and the thread has ended; or the
                exception of a signal handler meanwhile, and the thread may still be ending.
        """
        self._before_leaving = before_leaving
        self._process = os.getpid()
        self._opened: Outcome[T] = Outcome()
        self._ended = Latch()  # set by `_run` as its last act
        self._pending: set[Call[Any]] = set()
        self._failure: BaseException | None = None
        self._close_requested = False  # set by `ask_to_close`, which `close` calls too
        self._close_called = False  # set only by `close`
        self._log_failure = False  # True if perhaps no call of `close` waits for the failure
        self._closing = trio.Event()
        # The scope of the whole event loop, cancelled only while `_opened` is not set.
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._thread = PortalThread(partial(self._run, manager), name)
        try:
            watcher.watch(self)
            start(self._thread)
        except OSError:
            watcher.forget(self)
            raise
        except BaseException:
            # The exception of a signal handler.  The thread may have been started.
            self.ask_to_close()
            raise
        try:
            self.value = self._opened.result()
        except BaseException:
            # Entering has failed, or a signal handler's exception has interrupted the wait.
            self.ask_to_close()
            self._wait_for_end()
            raise

    def is_alive(self) -> bool:
        """Return whether the portal's event loop runs in this process; False in a forked child."""
        # `Thread.is_alive` is not used, for the reason in `latch`.
        return self._token is not None and not self._ended.is_set and self._process == os.getpid()

    def call(self, function: Callable[[*Args], Awaitable[R]], *args: *Args) -> R:
        """Run an async function in the event loop; return its result or raise its error.

        After an exception of a signal handler in the caller, ``function`` runs on.

        Raises:
            PortalClosedError: The portal is closing or closed, runs in another process, or failed
                during the call.  In the last case ``function`` may have been cancelled.  Also if
                the caller must not wait (`in_portal_thread`).
        """
        call = Call(partial(function, *args))
        # Record the call before it is queued: when the loop ends, `_run` fails all recorded calls,
        # so no caller waits forever.
        self._pending.add(call)
        try:
            if not self.is_alive() or in_portal_thread():
                raise closed_error()
            self._send(partial(self._start, call))
            return call.result()
        finally:
            self._pending.discard(call)

    def call_to_end(self, function: Callable[[*Args], Awaitable[R]], *args: *Args) -> R:
        """Run an async function in the event loop; return its result or raise its error.

        An exception of a signal handler cancels ``function``, and is raised when ``function`` has
        ended.  So the caller can reuse the arguments then.

        Raises:
            PortalClosedError: As in `call`.
        """
        call = Call(partial(function, *args))
        self._pending.add(call)
        try:
            if not self.is_alive() or in_portal_thread():
                raise closed_error()
            try:
                self._send(partial(self._start, call))
                call.wait()
            except BaseException:
                self._end(call)
                raise
            return call.result()
        finally:
            self._pending.discard(call)

    def _end(self, call: Call[Any]) -> None:
        """Cancel a call, and wait until it has ended, also if signal handlers raise exceptions."""
        while not (call.is_set or self._ended.is_set):
            with suppress(BaseException):
                self._send(partial(self._cancel, call))
                call.wait()

    def _cancel(self, call: Call[Any]) -> None:
        """Cancel a call, or let it fail if it was not queued.  Runs in the event loop."""
        call.scope.cancel()
        if not call.has_begun and not call.is_set:
            call.set_error(closed_error())

    def start(self, function: Callable[[*Args], Awaitable[object]], *args: *Args) -> None:
        """Start an async function in the event loop, without waiting; its error is logged.

        The portal does not close before the function has ended.

        Raises:
            PortalClosedError: The event loop has ended, or runs in another process.
        """
        if not self.is_alive():
            raise closed_error()
        self._send(partial(self._start, LoggedCall(partial(function, *args), self._thread.name)))

    def raise_failure(self) -> None:
        """Raise PortalClosedError if the event loop, or leaving the context manager, has failed."""
        if self._failure is not None:
            raise closed_error() from self._failure

    def close(self) -> BaseException | None:
        """Leave the context manager, and wait until the thread has ended.

        A second call waits as well, and returns the same.  An exception of a signal handler can end
        the wait; then the portal closes in the background.  A caller that must not wait
        (`in_portal_thread`) must not call this method.

        Returns:
            The error of the context manager or of one of its background tasks, or None.  It is
            not raised, so that the caller can distinguish it from the exception of a signal
            handler.
        """
        self._close_called = True
        try:
            self.ask_to_close()
            self._wait_for_end()
        except BaseException:
            self._log_failure = True  # the caller may not call `close` again
            raise
        return self._failure

    def _wait_for_end(self) -> None:
        """Wait until the thread has ended, or return immediately in a forked child."""
        if self._process == os.getpid():
            self._ended.wait()
            # Not without the line above: an interrupted join can mark a thread that still runs as
            # ended (see `latch`).
            self._thread.join()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the event loop, and do not wait for it.

        Nothing is called if the event loop has ended.  The function must not raise.
        """
        if self.is_alive():
            with suppress(PortalClosedError):
                self._send(function)

    def _send(self, function: Callable[[], object]) -> None:
        """Queue a function for the event loop; raise PortalClosedError if the loop has ended."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(function)
                return
        except trio.RunFinishedError:
            pass
        raise closed_error()

    def ask_to_close(self) -> None:
        """Start to close the portal, and return without waiting until it is closed.

        If the context manager is still being entered, entering is cancelled.  `close` returns
        the error if leaving fails.  If leaving began before `close` was called, the error is also
        logged.  A finalizer, which Python can run in any thread, may call this method, but not
        `close`.
        """
        self._close_requested = True
        self.call_soon(self._begin_closing)

    def _begin_closing(self) -> None:
        """End `_serve`.  Runs in the event loop."""
        if self._opened.is_set:
            self._closing.set()
        else:
            self._scope.cancel()

    def _run(self, manager: AbstractAsyncContextManager[T]) -> None:
        """Run the event loop; the thread ends with it."""
        serves_portal.set(True)
        try:
            trio.run(self._serve, manager)
        except BaseException as error:  # noqa: BLE001  raised by the constructor, or returned by close
            if self._opened.is_set:
                self._failure = error
                if self._log_failure:
                    # The caller may never call `close`.
                    _log.error("%s: %s", self._thread.name, error)
            else:
                self._opened.set_error(error)
        finally:
            # Fail the calls that the loop has not run.  Later calls find that the loop has ended.
            for call in list(self._pending):
                if not call.is_set:
                    call.set_error(closed_error())
            watcher.forget(self)
            self._ended.set()

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
                    self._log_failure |= not self._close_called
                    # No call starts from here on.  The nursery waits for the running calls
                    # before the context manager is left.  If the wait for `_closing` has
                    # raised, the nursery cancels the running calls first.
                    self._nursery = None
                    self._before_leaving(value)
        if not self._opened.is_set:
            raise closed_error()

    def _start(self, call: Call[Any]) -> None:
        """Start a call, or let it fail if the portal is closing.  Runs in the event loop."""
        if self._nursery is None:
            call.set_error(closed_error())
        else:
            call.has_begun = True
            self._nursery.start_soon(call.run)
