"""Receiving SIGTERM, SIGINT and SIGHUP in the event loop of a mount."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    SignalHandler: TypeAlias = Callable[[str], None]
    """Called with the name of a signal."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that end a mount."""


class SignalDispatcher:
    """Passes each signal to the handler of the present phase of the mount."""

    def __init__(self, handler: SignalHandler) -> None:
        """Set the handler of the first phase; no signal is received before `run`."""
        self._handler = handler

    def handle_with(self, handler: SignalHandler) -> None:
        """Begin the next phase of the mount, in which all signals are passed to ``handler``."""
        self._handler = handler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive signals until cancelled; after that, the signals have no effect on the process.

        If the process ignores SIGHUP, as under nohup(1), SIGHUP stays ignored.  The same holds for
        SIGINT, which a shell without job control ignores in a background job, so that Ctrl-C ends
        only the job in the foreground.  SIGTERM is received in any case, because SIGKILL, which
        would follow, loses data.
        """
        numbers = [
            number
            for number in SIGNALS
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
        ]
        early = _replace_handlers(numbers)
        with trio.open_signal_receiver(*numbers) as signals:
            # Signals that arrived before the receiver was open are raised again, so that it gets
            # them.
            for number in early:
                signal.raise_signal(number)
            task_status.started()
            async for number in signals:
                self._handler(signal.Signals(number).name)


def _replace_handlers(numbers: list[signal.Signals]) -> list[int]:
    """Replace the handlers of signals by one that only appends the signal to the returned list.

    At the end of a signal receiver, trio restores the former handlers, and raises again the signals
    that it has not delivered.  With the default handlers, such a signal could kill a process that
    has closed all images and only has to exit.
    """
    received: list[int] = []
    for number in numbers:
        signal.signal(number, lambda number, _frame: received.append(number))
    return received


def ignore_signals() -> None:
    """Ignore `SIGNALS` until the process exits.

    When Python exits, it restores the default action of each signal that has a handler, so a late
    signal could change the exit code.  It leaves an ignored signal ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
