"""SIGTERM, SIGINT and SIGHUP in the event loop of a mount."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    SignalHandler: TypeAlias = Callable[[str], None]
    """Called with the name of a signal."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SignalDispatcher:
    """Passes each signal to one handler, which depends on the phase of the mount."""

    def __init__(self, handler: SignalHandler) -> None:
        """Pass signals to ``handler`` first, once `run` has started."""
        self._handler = handler

    def handle_with(self, handler: SignalHandler) -> None:
        """Begin another phase: pass all further signals to ``handler``."""
        self._handler = handler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive signals until cancelled; from then on the process ignores them."""
        received = list(SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # set by nohup(1)
            received.remove(signal.SIGHUP)
        early = _replace_handlers(received)
        with trio.open_signal_receiver(*received) as signals:
            for number in early:
                signal.raise_signal(number)
            task_status.started()
            async for number in signals:
                self._handler(signal.Signals(number).name)


def _replace_handlers(numbers: list[signal.Signals]) -> list[int]:
    """Replace the handlers of signals by one that only appends the signal to the returned list.

    At the end of a receiver, trio restores the handlers that it has found, and raises the
    signals again that it has not delivered.  The default action would then kill a process that
    has closed all images and only has to exit.
    """
    received: list[int] = []
    for number in numbers:
        signal.signal(number, lambda number, _frame: received.append(number))
    return received


def ignore_signals() -> None:
    """Ignore `SIGNALS` until the process exits; the interpreter does not restore them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
