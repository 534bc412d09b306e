"""Signals: the first one cancels the work, and the clean-up always runs to its end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli import entrypoints
from qedfuse.cli.qedimg import main as program
from qedfuse.cli.qedimg.running import SIGNALS, interruptible, run_async
from qedfuse.errors import ImageError
from qedfuse.util import garbagecollector
from tests.support.fakecommand import finish, install, start, words

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

FAILURE = ImageError("half written")

signals = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def kill(number: int) -> None:
    """Send this process a signal, which has arrived when the function returns."""
    signal.raise_signal(number)


def test_arguments_and_result() -> None:
    """Arguments are passed on and the result is returned."""

    async def add(left: int, right: int) -> int:
        await trio.lowlevel.checkpoint()
        return left + right

    assert run_async(add, 1, 2) == 3
    with interruptible():
        assert run_async(add, 3, 4) == 7
        assert run_async(add, 5, 6) == 11


def test_errors_are_not_grouped() -> None:
    """An exception is raised as itself, not in an exception group."""

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise FAILURE

    with pytest.raises(ImageError, match="half written"):
        run_async(fail)


@signals
def test_signal_cancels(number: int) -> None:
    """A signal cancels the work, and a shielded clean-up completes although signals continue."""
    done = []

    async def work() -> None:
        try:
            kill(number)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for _ in range(5):
                    kill(number)
                    await trio.lowlevel.checkpoint()
                done.append("put away")

    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        run_async(work)
    assert done == ["put away"]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_when_the_work_is_done_ends_what_follows() -> None:
    """A signal during the last step keeps the result and cancels the next call."""
    begun = []

    async def work() -> int:
        kill(signal.SIGINT)
        return 1

    async def more() -> None:
        await trio.lowlevel.checkpoint()
        begun.append("more")

    with interruptible():
        assert run_async(work) == 1
        with pytest.raises(KeyboardInterrupt):
            run_async(more)
    assert not begun


def test_a_failure_during_clean_up_is_raised() -> None:
    """An exception of the clean-up is raised instead of KeyboardInterrupt."""

    async def work() -> None:
        try:
            kill(signal.SIGINT)
            await trio.sleep_forever()
        finally:
            raise FAILURE

    with pytest.raises(ImageError, match="half written"):
        run_async(work)


@signals
def test_plain_code_is_interrupted_once(number: int) -> None:
    """A `finally` of code outside trio is not interrupted again, nor are async calls in it."""
    done = []

    async def tidy() -> None:
        await trio.lowlevel.checkpoint()
        done.append("tidied")

    with interruptible():
        try:
            with pytest.raises(KeyboardInterrupt):
                kill(number)
        finally:
            kill(number)
            done.append("finally")
    assert done == ["finally"]
    with pytest.raises(KeyboardInterrupt), interruptible():
        kill(number)
    assert done == ["finally"]
    run_async(tidy)
    assert done == ["finally", "tidied"]


def test_ignored_signals_stay_ignored() -> None:
    """A signal that is ignored at the start, as under nohup, stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            kill(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_modules_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While modules are imported SIGINT has its default action, which prints no traceback."""
    seen = []

    def stand_in() -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 7

    monkeypatch.setattr(program, "main", stand_in)
    monkeypatch.setattr(garbagecollector, "collect_rarely", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert entrypoints.qedimg_program() == 7
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize(
    "program",
    ["qedimg_program", "qedfuse_program"],
)
def test_interrupt_at_any_moment_of_the_start(program: str) -> None:
    """SIGINT at any moment of the start shows no traceback."""
    script = (
        "import os, sys; from qedfuse.cli.dispositions import sigint_default; sigint_default(); "
        f"os.write(1, b'.'); from qedfuse.cli.entrypoints import {program}; sys.exit({program}())"
    )
    chance, codes = random.Random(11), set()
    for _ in range(24):
        process = start([sys.executable, "-c", script, "--help"])
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGINT)
        code, _output, complaint = finish(process)
        assert complaint in {"", "qedimg: interrupted\n"}
        codes.add(code)
    assert codes <= {0, 130, -signal.SIGINT}
    assert -signal.SIGINT in codes


@pytest.mark.parametrize("program", ["qedimg", "qedfuse"])
def test_sigterm_before_the_program_is_loaded(program: str) -> None:
    """SIGTERM while modules are loaded prints one line; the process ends by the signal."""
    script = (
        "import os, signal, sys; from importlib.abc import MetaPathFinder\n"
        "class Finder(MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'qedfuse.cli.{program}.main': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"from qedfuse.cli.entrypoints import {program}_program; {program}_program()"
    )
    code, output, complaint = finish(start([sys.executable, "-c", script, "--help"]))
    assert (code, output) == (-signal.SIGTERM, "")
    assert complaint == f"{program}: ended by SIGTERM\n"


def test_the_mount_can_be_interrupted_once_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own handler of SIGINT is active exactly while the command runs."""
    seen = []

    def stand_in(_words: object) -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 7

    monkeypatch.setattr(sys, "argv", ["qedfuse", "umount", "x"])
    monkeypatch.setattr("qedfuse.cli.qedfuse.main._COMMANDS", {"umount": stand_in})
    monkeypatch.setattr(garbagecollector, "collect_rarely", lambda: None)
    changed = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [(number, signal.getsignal(number)) for number in changed]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert entrypoints.qedfuse_program() == 7
        seen.append(signal.getsignal(signal.SIGINT))
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert seen == [signal.default_int_handler, signal.SIG_DFL]


def test_usr1_without_progress_does_no_harm() -> None:
    """SIGUSR1 without progress is ignored instead of ending the program."""
    with interruptible():
        kill(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_interrupt_in_a_destructor(capfd: pytest.CaptureFixture[str]) -> None:
    """A signal during a destructor prints nothing, and the next call is cancelled."""

    class Late:
        def __del__(self) -> None:
            kill(signal.SIGINT)

    async def work() -> None:
        await trio.sleep_forever()

    with interruptible():
        late = Late()
        del late
        with pytest.raises(KeyboardInterrupt):
            run_async(work)
    assert capfd.readouterr() == ("", "")


@signals
def test_exit_code(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each signal exits with 130 and one line, in commands with and without trio."""

    async def work() -> int:
        kill(number)
        await trio.sleep(3600)
        return 0

    def plain(_arguments: argparse.Namespace) -> int:
        kill(number)
        return 0

    def on_trio(_arguments: argparse.Namespace) -> int:
        return run_async(work)

    def importing(_arguments: argparse.Namespace) -> int:
        try:
            kill(number)
        except KeyboardInterrupt as error:
            raise ImportError from error
        return 0

    runs: list[Callable[[argparse.Namespace], int]] = [plain, on_trio, importing]
    for run in runs:
        install(monkeypatch, run)
        assert program.main(["fake"]) == 130
        assert capsys.readouterr().err == "qedimg: interrupted\n"


BLOCKED = """
    import trio
    async def work():
        try:
            os.write(1, b"ready\\n")
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                os.write(1, b"cancelled\\n")
                # The test sends more signals first.
                await trio.to_thread.run_sync(os.read, 0, 1)
                os.write(1, b"put away\\n")
    return run_async(work)
"""


@signals
def test_signals_to_a_process(number: int) -> None:
    """Further signals from outside during the clean-up do not interrupt it."""
    reading, writing = os.pipe()
    process = start(words(BLOCKED), stdin=reading)
    os.close(reading)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(number)
    assert process.stdout.readline() == b"cancelled\n"
    for again in (number, *SIGNALS):
        process.send_signal(again)
    os.write(writing, b"x")
    os.close(writing)
    assert finish(process) == (130, "put away\n", "qedimg: interrupted\n")


def test_signal_while_threads_work() -> None:
    """A thread in a system call does not delay the handling of a signal."""
    run = """
    import functools, trio
    async def work():
        async with trio.open_nursery() as nursery:
            read = functools.partial(trio.to_thread.run_sync, abandon_on_cancel=True)
            nursery.start_soon(read, os.read, 0, 1)
            os.write(1, b"ready\\n")
    return run_async(work)
    """
    reading, writing = os.pipe()
    process = start(words(run), stdin=reading)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (130, "", "qedimg: interrupted\n")
    os.close(reading)
    os.close(writing)
