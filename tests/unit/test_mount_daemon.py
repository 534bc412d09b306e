"""Going to the background: what the parent says about how the child fared."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, select, signal, sys
{prelude}
from qedfuse.mount.process.daemon import run_in_background

def serve(ready):
    {body}

sys.exit(run_in_background(serve))
"""


def run(body: str, prelude: str = "") -> tuple[int, str]:
    """Run ``serve`` with this body; give the parent's exit code and what both printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body, prelude=prelude)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_ready_is_success() -> None:
    """The parent ends when the child is ready, and nothing later can change that."""
    assert run("ready(); print('lost'); return 5") == (0, "")


@pytest.mark.parametrize("code", [1, 12, 32])
def test_a_failure_keeps_its_exit_code(code: int) -> None:
    """What the child printed is seen, and its code is the parent's."""
    assert run(f"sys.stderr.write('why'); return {code}") == (code, "why")


@pytest.mark.parametrize(
    ("body", "how"),
    [("os._exit(0)", "ended"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")],
)
def test_a_silent_death_is_told(body: str, how: str) -> None:
    """The parent never claims success for a child that said nothing."""
    assert run(body) == (
        32,
        f"qedfuse: the process in the background {how} before the disk was ready\n",
    )


def test_an_exception_is_a_failure() -> None:
    """The child never returns into the caller's code, and never succeeds by accident."""
    code, _printed = run("raise SystemExit(0)")
    assert code == 70


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_child_too(name: str) -> None:
    """Signals reach the parent only; the child is told, and has ended when the parent returns."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'told'), os._exit(0)));"
        f"os.kill(os.getppid(), signal.{name}); signal.pause()"
    )
    assert run(body) == (130, "told")


def test_an_ignored_signal_stays_ignored() -> None:
    """What nohup(1) starts goes on without the terminal."""
    body = "os.kill(os.getppid(), signal.SIGHUP); ready(); return 0"
    assert run(body, "signal.signal(signal.SIGHUP, signal.SIG_IGN)") == (0, "")


def test_a_second_signal_ends_the_parent_at_once() -> None:
    """A child that does not end when it is told to keeps nobody waiting."""
    body = (
        "parent = os.getppid(); end = os.pidfd_open(parent);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "os.kill(parent, signal.SIGTERM); signal.sigwait([signal.SIGTERM]);"
        "os.kill(parent, signal.SIGHUP); select.select([end], [], [])"
    )
    assert run(body)[0] == -signal.SIGHUP


def test_a_child_that_nobody_waits_for_fails() -> None:
    """When the parent was killed, being ready is an error: nobody knows of the mount."""
    body = (
        "parent = os.pidfd_open(os.getppid()); os.kill(os.getppid(), signal.SIGKILL);"
        "select.select([parent], [], []); report = os.dup(1)\n"
        "    try: ready()\n"
        "    except QedError as error: os.write(report, str(error).encode())"
    )
    prelude = "from qedfuse.errors import QedError; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert run(body, prelude) == (-9, "the command that waited for the mount has ended")
