"""Progress as the user sees it: on a terminal, in a log, on SIGUSR1."""

from __future__ import annotations

import argparse
import os
import pty
import re
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg import progress as module
from qedfuse.cli.qedimg.progress import Meter, progress
from tests.support.fakecommand import finish, start, words
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from collections.abc import Callable


def arguments(*, quiet: bool = False, wanted: bool = False) -> argparse.Namespace:
    """Return parsed arguments."""
    return argparse.Namespace(quiet=quiet, progress=wanted)


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


def steps(report: Callable[[int, int], None], total: int) -> None:
    """Report each step of some work."""
    for done in range(total + 1):
        report(done, total)


def test_no_progress_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    """A pipe gets no progress without -p."""
    with progress(arguments(), "Working") as report:
        steps(report, 1000)
    assert capfd.readouterr() == ("", "")


def test_percentages_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    """With -p a pipe gets each percentage once, however often it is reported."""
    with progress(arguments(wanted=True), "Working") as report:
        steps(report, 5000)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Working: 0.0 %"
    assert lines[-1] == "Working: 100.0 %"
    assert len(lines) == 101


def test_progress_is_shown_before_the_first_report(capfd: pytest.CaptureFixture[str]) -> None:
    """With -p the bar or the first line is shown immediately, even if the work reports nothing."""
    with progress(arguments(wanted=True), "Working"):
        assert capfd.readouterr().err == "Working: 0.0 %\n"
    assert capfd.readouterr().err == ""
    run = """
    with progress(arguments, "Working"):
        pass
    return 0
    """
    for options, bar in (("-p",), True), (("-p", "-q"), False), ((), False):
        code, output, shown = on_terminal(run, *options)
        assert (code, output) == (0, "")
        assert ("━" in shown) is bar


def test_no_thread_for_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread, the first report after the delay shows the bar, and the work goes on."""
    clock = Clock(monkeypatch)
    shown: list[float] = []
    monkeypatch.setattr(Meter, "_draw", lambda _meter: shown.append(clock.now))
    meter = run_without(
        CLONE3, lambda: Meter("Working", bar=True, lines=False, delay_seconds=100.0)
    )
    meter.report(1, 2)
    clock.now += 100
    meter.report(2, 2)
    assert shown == [clock.now]
    meter.close()


def test_quiet_wins(capfd: pytest.CaptureFixture[str]) -> None:
    """-q silences progress also with -p."""
    with progress(arguments(wanted=True, quiet=True), "Working") as report:
        steps(report, 100)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("done", "total", "percent"), [(0, 0, 0.0), (5, 0, 0.0), (1, 3, 100 / 3), (7, 5, 100.0)]
)
def test_odd_reports(done: int, total: int, percent: float) -> None:
    """Work without steps is 0 %, and more steps than expected are 100 %."""
    meter = Meter("Working", bar=False, lines=False)
    meter.report(done, total)
    assert meter.percent == percent


def test_usr1(capfd: pytest.CaptureFixture[str]) -> None:
    """SIGUSR1 prints one line each time, also with -q."""
    with progress(arguments(quiet=True), "Working") as report:
        signal.raise_signal(signal.SIGUSR1)
        report(1, 8)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
    assert capfd.readouterr().err == "Working: 0.0 %\n" + 2 * "Working: 12.5 %\n"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_usr1_to_a_process_that_waits() -> None:
    """SIGUSR1 is answered while the work waits in a system call and reports nothing."""
    run = """
    import trio
    async def work():
        with progress(arguments, "Working") as report:
            report(1, 4)
            os.write(1, b"ready\\n")
            await trio.to_thread.run_sync(os.read, 0, 1)
            report(4, 4)
        return 0
    return run_async(work)
    """
    reading, writing = os.pipe()
    process = start(words(run), stdin=reading)
    os.close(reading)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        assert process.stderr.readline() == b"Working: 25.0 %\n"
    os.close(writing)
    assert finish(process) == (0, "", "")


def test_progress_without_a_reader() -> None:
    """The work continues if stderr is a closed pipe."""
    run = """
    with progress(arguments, "Working") as report:
        for done in range(101):
            report(done, 100)
            os.kill(os.getpid(), signal.SIGUSR1)
    print("done")
    return 0
    """
    reading, writing = os.pipe()
    os.close(reading)
    process = start(words(run, "-p"), stderr=writing)
    os.close(writing)
    assert finish(process) == (0, "done\n", "")


def on_terminal(run: str, *options: str) -> tuple[int, str, str]:
    """Run ``fake`` with stderr on a terminal; return exit code, output and the terminal's text."""
    master, slave = pty.openpty()
    process = start(words(run, *options), {"TERM": "xterm", "COLUMNS": "80"}, stderr=slave)
    os.close(slave)
    shown = bytearray()
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # the end of a terminal
        pass
    os.close(master)
    code, output, _ = finish(process)
    return code, output, shown.decode()


def plain(shown: str) -> str:
    """Remove colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


WORK = """
    clock = [1000.0]
    time.monotonic = lambda: clock[0]
    with progress(arguments, "Working [hard]") as report:
        for done in range(0, 101):
            clock[0] += %s
            report(done, 100)
            if done == 50:
                os.kill(os.getpid(), signal.SIGUSR1)
    print("done")
    return 0
"""


def test_bar_on_a_terminal() -> None:
    """Work of more than a second shows a bar, which is erased at the end."""
    code, output, shown = on_terminal(WORK % 0.05)
    assert (code, output) == (0, "done\n")
    assert "Working [hard]" in plain(shown)
    assert "━" in shown
    assert re.search(r"\b100%|\b9\d%", plain(shown))
    # The answer to the signal has its own line.
    assert "\r\x1b[2KWorking [hard]: 50.0 %\r\n" in shown
    # The cursor is visible again, and the line is erased last.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rindex("\x1b[2K") > shown.rindex("━")


@pytest.mark.parametrize(("options", "bar"), [((), False), (("-p",), True), (("-p", "-q"), False)])
def test_no_bar_for_quick_work(options: tuple[str, ...], bar: bool) -> None:  # noqa: FBT001
    """Work of less than a second shows a bar only with -p."""
    code, output, shown = on_terminal(WORK % 0.0001, *options)
    assert (code, output) == (0, "done\n")
    assert ("━" in shown) is bar
    assert "Working [hard]: 50.0 %" in shown


def test_bar_and_interrupt() -> None:
    """After an interrupt the cursor is visible, and the message has its own line."""
    run = """
    import trio
    async def work():
        with progress(arguments, "Working") as report:
            report(1, 2)
            os.kill(os.getpid(), signal.SIGINT)
            await trio.sleep_forever()
    return run_async(work)
    """
    code, output, shown = on_terminal(run, "-p")
    assert (code, output) == (130, "")
    assert plain(shown).endswith("qedimg: interrupted\r\n")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_bar_is_redrawn_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the work reports, the bar is redrawn at most ten times a second."""
    clock = Clock(monkeypatch)
    drawn = []
    meter = Meter("Working", bar=True, lines=False)
    monkeypatch.setattr(meter, "_draw", lambda: drawn.append(clock.now))
    for step in range(10000):
        clock.now = 1000 + step / 1000
        meter.report(step, 10000)
    meter.close()
    assert len(drawn) == 90
    assert drawn[0] == 1001


def test_an_interrupted_close_removes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C while close() waits for the thread that shows the bar, the bar is removed."""
    meter = Meter("Working", bar=True, lines=False, delay_seconds=100.0)
    meter.show()
    shown, starter = meter._progress, meter._starter
    assert shown is not None
    assert starter is not None
    is_started = shown.live.is_started

    def interrupt() -> None:
        raise KeyboardInterrupt

    join = starter.join
    monkeypatch.setattr(starter, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        meter.close()
    join()
    assert (is_started, shown.live.is_started) == (True, False)


def test_bar_without_a_report() -> None:
    """A bar is shown for work that reports nothing in its first second."""
    run = """
    with progress(arguments, "Working") as report:
        time.sleep(1.4)
        os.kill(os.getpid(), signal.SIGUSR1)
        report(0, 0)
        time.sleep(0.2)
        report(1, 2)
    return 0
    """
    code, output, shown = on_terminal(run)
    assert (code, output) == (0, "")
    assert "━" in shown
    assert "Working: 0.0 %" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert shown.rindex("\x1b[2K") > shown.rindex("━")
    code, output, shown = on_terminal(run, "-q")
    assert "━" not in shown
