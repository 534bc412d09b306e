"""Running a subcommand so that Ctrl-C, SIGTERM and a closed terminal end it in an orderly way."""

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
"""What ends a subcommand early; one that was ignored from the start stays so (nohup)."""

T = TypeVar("T")


class Interruption:
    """Whether a signal came, and what is to happen then.

    Only the first signal counts.  A second one would hit the putting away that the first
    one began, and leave on the disk what was to be put away.
    """

    def __init__(self) -> None:
        self.came = False
        self._deferred = False
        self._cancel: Callable[[], None] | None = None

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Cancel what runs; outside of `run`, raise.

        Raises:
            KeyboardInterrupt: Nothing runs that could be cancelled.
        """
        if self.came:
            return
        self.came = True
        if not self._deferred:
            raise KeyboardInterrupt
        if self._cancel is not None:
            self._cancel()

    def run(self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]) -> T:
        """Run an asynchronous function to its end.

        Raises:
            KeyboardInterrupt: A signal came.
        """
        import trio  # noqa: PLC0415  a quick --help

        self._deferred = True
        try:
            results = trio.run(self._cancellable, function, args)
        finally:
            self._deferred = False
        if not results:
            raise KeyboardInterrupt
        # A signal that came when everything was done has nothing left to end.
        return results[0]

    async def _cancellable(
        self, function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> list[T]:
        """Give the function's result in a list; an empty one if it was cancelled."""
        import trio  # noqa: PLC0415

        token: TrioToken = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:
            # From a signal handler, which may come at any point of trio's own work.
            self._cancel = lambda: token.run_sync_soon(scope.cancel)
            try:
                if self.came:
                    scope.cancel()
                return [await function(*args)]
            finally:
                self._cancel = None
        return []


_active: list[Interruption] = []
"""The one whose handlers are installed, if any."""


def _forget_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """Say nothing of an interrupt that was raised where nobody can catch it.

    Python's own callbacks are such places.  The interruption is remembered all the same.
    """
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


@contextmanager
def interruptible(*, last: bool = False) -> Iterator[Interruption]:
    """Let signals end the block with a KeyboardInterrupt, once, or cancel what it runs.

    SIGUSR1 does no harm in the block, whether or not there is any progress to show.

    Args:
        last: The process ends after the block: signals are ignored then, since they could
            only show a traceback.
    """
    interruption = Interruption()
    before = {
        number: signal.signal(number, interruption.on_signal)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    _active.append(interruption)
    hook, sys.unraisablehook = sys.unraisablehook, _forget_interrupt
    try:
        yield interruption
    finally:
        _active.pop()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


def run_async(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run an asynchronous function to its end; a signal cancels it.

    A KeyboardInterrupt in the midst of anything could leave a disk between two states.
    A cancelled disk closes itself as at its usual end, and only then the program ends.

    Raises:
        KeyboardInterrupt: A signal came, and everything has been put away.
    """
    if _active:
        return _active[-1].run(function, args)
    with interruptible() as interruption:
        return interruption.run(function, args)
