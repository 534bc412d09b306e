"""Run a subcommand so that Ctrl-C, SIGTERM and a closed terminal cancel it cleanly."""

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
"""The signals that end a subcommand; one that was ignored from the start (nohup) stays so."""

T = TypeVar("T")


class Interruption:
    """Turns the first signal into a cancellation or a KeyboardInterrupt.

    Later signals are ignored: a second one would interrupt the cleanup that the first one
    has started, and leave temporary files and dirty images behind.

    Attributes:
        came: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.came = False
        self._deferred = False
        self._cancel: Callable[[], None] | None = None

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: cancel what `run` runs; outside of `run`, raise.

        Raises:
            KeyboardInterrupt: Nothing is running that could be cancelled.
        """
        if self.came:
            return
        self.came = True
        if not self._deferred:
            raise KeyboardInterrupt
        if self._cancel is not None:
            self._cancel()

    def run(self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> T:
        """Run an asynchronous function to its end, and return its result.

        Raises:
            KeyboardInterrupt: A signal has cancelled it.
        """
        import trio  # noqa: PLC0415  imported late: --help must not load it

        self._deferred = True
        try:
            results = trio.run(self._cancellable, function, args)
        finally:
            self._deferred = False
        if not results:
            raise KeyboardInterrupt
        # A signal that came after the function was done does not change its result.
        return results[0]

    async def _cancellable(
        self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> list[T]:
        """Return the function's result in a list, which is empty if it was cancelled."""
        import trio  # noqa: PLC0415

        token: TrioToken = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:
            # Called by a signal handler, which may interrupt trio's own code at any point;
            # only run_sync_soon is safe there.
            self._cancel = lambda: token.run_sync_soon(scope.cancel)
            try:
                if self.came:
                    scope.cancel()
                return [await function(*args)]
            finally:
                self._cancel = None
        return []


_active: list[Interruption] = []
"""The interruption whose signal handlers are installed, if any."""


def _ignore_lost_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Print nothing about a KeyboardInterrupt that no code can catch, as in a destructor.

    `Interruption.came` records the signal nevertheless.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


@contextmanager
def interruptible(*, last: bool = False) -> Iterator[Interruption]:
    """Handle signals in the block: the first one cancels `run_async`, or raises.

    Outside of `run_async` it raises KeyboardInterrupt.  SIGUSR1, which by default ends a
    process, is ignored unless `progress` handles it.

    Args:
        last: Whether the process ends after the block; then signals are ignored from there
            on, since they could only print a traceback.
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
            signal.signal(number, signal.SIG_IGN if last else handler)


def run_async(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run an asynchronous function to its end and return its result; a signal cancels it.

    A KeyboardInterrupt at any point of the code could leave an image between two states.
    After a cancellation the image is closed in the usual way, and then the program ends.

    Raises:
        KeyboardInterrupt: A signal has cancelled the function, and its cleanup is complete.
    """
    if _active:
        return _active[-1].run(function, args)
    with interruptible() as interruption:
        return interruption.run(function, args)
