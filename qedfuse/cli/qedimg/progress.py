"""The progress of a subcommand: a bar on a terminal after a second, and a line on SIGUSR1."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from types import FrameType

    from rich.progress import Progress, TaskID

    from qedfuse.util.backgroundtasks import Progress as ProgressCallback

_BAR_DELAY_SECONDS: Final = 1.0
"""How long work must take before a bar appears without ``-p``."""
_REDRAW_SECONDS: Final = 0.1
"""Minimum time between two updates of the bar."""
_STDERR_FD: Final = 2
_ERASE_LINE: Final = "\r\x1b[2K"


class Meter:
    """Shows how much of the work is done.

    Some images are checked or scanned before the work begins, so the first call of `report` can
    come late.  Therefore a thread shows the bar after a delay, unless the delay is 0.
    """

    def __init__(
        self, label: str, *, bar: bool, lines: bool, delay_seconds: float = _BAR_DELAY_SECONDS
    ) -> None:
        """Show a ``bar`` after ``delay_seconds``, or print ``lines`` of percentages, or neither.

        A bar is shown rather than lines if both are requested.  Without a delay (0) the first
        call of `show` or `report` shows the bar.
        """
        self._label = label
        self._bar = bar
        self._lines = lines
        self._done = self._total = 0
        self._printed_percent = -1
        self._next_redraw = time.monotonic() + delay_seconds
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._drawing = threading.Lock()
        self._closed = threading.Event()
        self._starter: threading.Thread | None = None
        if bar and delay_seconds > 0:
            # If no thread can be started, the first `report` after the delay shows the bar.
            with suppress(OSError):
                self._starter = start_thread(self._draw_after, delay_seconds)

    def show(self) -> None:
        """Show the bar, or print the first line, before the first call of `report`."""
        if self._bar:
            self._draw()
        elif self._lines:
            self._printed_percent = int(self.percent)
            self.print()

    def report(self, done: int, total: int) -> None:
        """Update the progress: ``done`` of ``total`` in any unit; 0 stands for an unknown total."""
        self._done, self._total = done, total
        if self._bar:
            now = time.monotonic()
            if now >= self._next_redraw:
                self._next_redraw = now + _REDRAW_SECONDS
                self._draw()
        elif self._lines and int(self.percent) != self._printed_percent:
            self._printed_percent = int(self.percent)
            self.print()

    @property
    def percent(self) -> float:
        """How much is done, in percent, at most 100; 0 if the total is unknown."""
        return min(100.0, 100.0 * self._done / self._total) if self._total > 0 else 0.0

    def print(self) -> None:
        """Print a line with the percentage to stderr; safe in a signal handler.

        The signal may have interrupted a write to ``sys.stderr``, which is not reentrant, so the
        line is written to the descriptor.
        """
        line = f"{self._label}: {self.percent:.1f} %\n"
        if self._progress is not None:
            # The next update draws the bar again below the line.
            line = _ERASE_LINE + line
        with suppress(OSError):  # a closed stderr must not end the work
            os.write(_STDERR_FD, line.encode(errors="backslashreplace"))

    def close(self) -> None:
        """Remove the bar; the caller must not call `report` afterwards."""
        try:
            self._closed.set()
            if self._starter is not None:
                self._starter.join()
        finally:
            # Also if Ctrl-C has interrupted the join.  Then the thread may still be showing the
            # bar, which hides the cursor; the lock waits for it.
            with self._drawing:
                if self._progress is not None:
                    with suppress(OSError):  # the terminal is gone
                        self._progress.stop()

    def _draw(self) -> None:
        """Show or update the bar; do nothing if another thread is drawing or `close` was called."""
        # The caller of `report` must not wait for a thread that is drawing.
        if not self._drawing.acquire(blocking=False):
            return
        try:
            if self._closed.is_set():
                return
            if self._progress is None or self._task is None:
                self._start()
            else:
                self._progress.update(self._task, completed=self._done, total=self._total or None)
        except OSError:  # the terminal is gone; SIGHUP ends the work
            pass
        finally:
            self._drawing.release()

    def _draw_after(self, delay_seconds: float) -> None:
        """Show the bar after a delay, unless it is shown already or the work has ended."""
        if not self._closed.wait(delay_seconds) and self._progress is None:
            self._draw()

    def _start(self) -> None:
        """Show the bar for the first time."""
        from rich.console import Console  # noqa: PLC0415  imported late: slow, and often not needed
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(
            self._label, total=self._total or None, completed=self._done
        )
        self._progress.start()


def erase_bar() -> None:
    """Erase the line of a bar, if there may be one, so that output can begin there.

    The next update draws the bar again below the output.
    """
    if sys.stderr.isatty():
        with suppress(OSError):
            os.write(_STDERR_FD, _ERASE_LINE.encode())


@contextmanager
def progress(
    arguments: argparse.Namespace, label: str, *, bar: bool = True
) -> Iterator[ProgressCallback]:
    """Show the progress of the work in the block, and on SIGUSR1 print the percentage.

    Yields the callback to which the work must report its progress.

    Args:
        arguments: The parsed command line.  With ``-q`` only SIGUSR1 prints anything; ``-p`` shows
            the bar immediately, or prints lines if stderr is not a terminal.
        label: The name of the work, printed in front of the bar or the percentage.
        bar: Whether a bar can be shown if stderr is a terminal.
    """
    quiet: bool = arguments.quiet
    wanted: bool = getattr(arguments, "progress", False)
    terminal = sys.stderr.isatty()
    meter = Meter(
        label,
        bar=terminal and bar and not quiet,
        lines=wanted and not terminal and not quiet,
        delay_seconds=0.0 if wanted else _BAR_DELAY_SECONDS,
    )

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        meter.print()

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        if wanted:
            meter.show()
        yield meter.report
    finally:
        signal.signal(signal.SIGUSR1, before)
        meter.close()
