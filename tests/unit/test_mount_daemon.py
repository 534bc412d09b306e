"""Going to the background: what the parent says about how the child fared."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from qedfuse.mount.daemon import run_in_background

def serve(ready):
    {body}

sys.exit(run_in_background(serve))
"""


def run(body: str) -> tuple[int, str]:
    """Run ``serve`` with this body; give the parent's exit code and what both printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
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


def test_an_interrupt_ends_the_child_too() -> None:
    """Ctrl-C reaches the parent only; the child must not go on alone."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: (sys.stderr.write('told'), os._exit(0)));"
        "os.kill(os.getppid(), signal.SIGINT); signal.pause()"
    )
    assert run(body) == (130, "told")
