"""Running a subcommand so that Ctrl-C, SIGTERM and a closed terminal cancel it cleanly."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import FrameType

    from trio.lowlevel import TrioToken

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a subcommand, unless they are ignored when the program starts."""

T = TypeVar("T")


class Interruption:
    """Turns the first signal into a cancellation or a KeyboardInterrupt.

    Later signals are ignored, because they would interrupt the cleanup, and so leave temporary
    files and dirty images behind.

    Attributes:
        has_signal: Whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.has_signal = False
        # Whether `run` is active.  If so, a signal must not raise KeyboardInterrupt.
        self._deferred = False
        # Cancels the function that `run` is running; None if no function is running.
        self._cancel: Callable[[], None] | None = None

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Cancel the function that `run` runs; raise KeyboardInterrupt if `run` is not active."""
        if self.has_signal:
            return
        self.has_signal = True
        if not self._deferred:
            raise KeyboardInterrupt
        if self._cancel is not None:
            self._cancel()

    def run(self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> T:
        """Run an asynchronous function, and return its result.

        A signal that has arrived before this call cancels the function at its first checkpoint.
        One that arrives after the function has returned does not change the result.

        Raises:
            KeyboardInterrupt: A signal has cancelled the function, and its cleanup is complete.
        """
        import trio  # noqa: PLC0415  imported late: --help must not load it

        self._deferred = True
        try:
            results = trio.run(self._cancellable, function, args)
        finally:
            self._deferred = False
        if not results:
            raise KeyboardInterrupt
        return results[0]

    async def _cancellable(
        self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> list[T]:
        """Return the function's result in a list, which is empty if the function was cancelled."""
        import trio  # noqa: PLC0415  imported late, as in `run`

        token: TrioToken = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:
            # The signal handler may interrupt trio's own code at any point.  Of trio's functions
            # only run_sync_soon is safe there.
            self._cancel = lambda: token.run_sync_soon(scope.cancel)
            try:
                # A signal that arrived before `_cancel` was set could not cancel the function.
                if self.has_signal:
                    scope.cancel()
                return [await function(*args)]
            finally:
                # The token raises an error once the event loop has ended.
                self._cancel = None
        return []


_active: list[Interruption] = []
"""The interruptions of the active `interruptible` blocks; the last one handles signals."""


def _ignore_lost_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Print an exception that no code can catch, unless it is a KeyboardInterrupt.

    For that one no message is needed, because `Interruption.has_signal` records its signal.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


@contextmanager
def interruptible(*, ends_process: bool = False) -> Iterator[Interruption]:
    """Handle signals in the block: the first signal cancels the function that `run_async` runs.

    If `run_async` is not active, the first signal raises KeyboardInterrupt.  SIGUSR1, which would
    end the process, is ignored unless the command handles it.

    Args:
        ends_process: Whether the process ends after the block.  If so, signals are ignored after
            the block, because they could only print a traceback.
    """
    interruption = Interruption()
    before = {
        number: signal.signal(number, interruption.on_signal)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    _active.append(interruption)
    hook, sys.unraisablehook = sys.unraisablehook, _ignore_lost_interrupt
    try:
        yield interruption
    finally:
        _active.pop()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ends_process else handler)


def run_async(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run an asynchronous function and return its result; a signal cancels the function.

    An exception at an arbitrary point could leave an image half changed.  So a signal cancels the
    function, which closes the image as after an error.

    Raises:
        KeyboardInterrupt: A signal has cancelled the function, and its cleanup is complete.
    """
    if _active:
        return _active[-1].run(function, args)
    with interruptible() as interruption:
        return interruption.run(function, args)
