"""How far a subcommand is: a bar on a terminal, a line on SIGUSR1, nothing on a quick job."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType

    from rich.progress import Progress, TaskID

_PATIENCE: Final = 1.0
"""Seconds without a bar: what is over by then needs none, unless it is asked for."""
_INTERVAL: Final = 0.1
"""Seconds between two changes of the bar; work may report far more often."""
_STDERR: Final = 2
_ERASE_LINE: Final = "\r\x1b[2K"


class Meter:
    """Shows how much is done.

    What comes before the first report, or between two, may take long as well: an image that
    was not closed cleanly is checked, one with little free space known is scanned.  So a
    thread sees to it that there is a bar in time.
    """

    def __init__(self, what: str, *, bar: bool, lines: bool, patience: float = _PATIENCE) -> None:
        """Show a ``bar`` after ``patience`` seconds, or ``lines`` of percentages, or neither."""
        self._what = what
        self._bar = bar
        self._lines = lines
        self._done = self._total = 0
        self._shown = -1
        self._next = time.monotonic() + patience
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._drawing = threading.Lock()
        self._closed = threading.Event()
        self._starter: threading.Thread | None = None
        if bar and patience > 0:
            self._starter = threading.Thread(target=self._start_late, args=(patience,), daemon=True)
            self._starter.start()

    def report(self, done: int, total: int) -> None:
        """Take note of how much of how much is done, in any unit."""
        self._done, self._total = done, total
        if self._bar:
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _INTERVAL
                self._draw()
        elif self._lines and int(self.percent) != self._shown:
            self._shown = int(self.percent)
            self.print()

    @property
    def percent(self) -> float:
        """How much is done; not more than all of it, whatever was reported."""
        return min(100.0, 100.0 * self._done / self._total) if self._total > 0 else 0.0

    def print(self) -> None:
        """Print a line with the percentage to stderr; fit for a signal handler.

        sys.stderr is not: the signal may have come while somebody wrote to it.
        """
        line = f"{self._what}: {self.percent:.1f} %\n"
        if self._progress is not None:
            # In the place of the bar, which is drawn again below.
            line = _ERASE_LINE + line
        with suppress(OSError):  # nobody reads it; the work goes on
            os.write(_STDERR, line.encode(errors="backslashreplace"))

    def close(self) -> None:
        """Take the bar away."""
        self._closed.set()
        if self._starter is not None:
            self._starter.join()
        if self._progress is not None:
            with suppress(OSError):  # the terminal is gone
                self._progress.stop()

    def _draw(self) -> None:
        """Show the bar, or move it."""
        # A report does not wait for the thread; there is going to be another one.
        if not self._drawing.acquire(blocking=False):
            return
        try:
            if self._closed.is_set():
                return
            if self._progress is None or self._task is None:
                self._start()
            else:
                self._progress.update(self._task, completed=self._done, total=self._total or None)
        except OSError:  # the terminal is gone, and a signal says so
            pass
        finally:
            self._drawing.release()

    def _start_late(self, patience: float) -> None:
        """Show the bar, whether or not there was a report."""
        if not self._closed.wait(patience) and self._progress is None:
            self._draw()

    def _start(self) -> None:
        """Show the bar; rich is loaded only now, because it takes its time."""
        from rich.console import Console  # noqa: PLC0415
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
            self._what, total=self._total or None, completed=self._done
        )
        self._progress.start()


@contextmanager
def progress(
    arguments: argparse.Namespace, what: str, *, bar: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show how far the work in the block is; gives the function to tell it to.

    Without ``bar`` there is none on a terminal either.
    """
    quiet: bool = arguments.quiet
    wanted: bool = getattr(arguments, "progress", False)
    terminal = sys.stderr.isatty()
    meter = Meter(
        what,
        bar=terminal and bar and not quiet,
        lines=wanted and not terminal and not quiet,
        patience=0.0 if wanted else _PATIENCE,
    )

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        meter.print()

    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        yield meter.report
    finally:
        signal.signal(signal.SIGUSR1, before)
        meter.close()
