"""Going to the background: what the parent reports about the child."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from qedfuse.errors import HostError
from qedfuse.mount.process.daemon import run_in_background
from qedfuse.util.descriptors import open_descriptors

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
    """The parent exits with 0 when the child is ready, whatever the child does later."""
    assert run("ready(); print('lost'); return 5") == (0, "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_after_the_success_changes_nothing(name: str) -> None:
    """A signal that arrives when the child is ready does not make the parent report a failure."""
    prelude = f"import atexit; atexit.register(os.kill, os.getpid(), signal.{name})"
    assert run("ready(); return 0", prelude) == (0, "")


@pytest.mark.parametrize("code", [1, 12, 32])
def test_a_failure_keeps_its_exit_code(code: int) -> None:
    """The parent passes on the child's output and exit code."""
    assert run(f"sys.stderr.write('why'); return {code}") == (code, "why")


@pytest.mark.parametrize(
    ("body", "how"),
    [("os._exit(0)", "ended"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")],
)
def test_a_silent_death_is_reported(body: str, how: str) -> None:
    """The parent reports a child that ended without a message as a failure."""
    assert run(body) == (
        32,
        f"qedfuse: the process in the background {how} before the disk was ready\n",
    )


def test_an_exception_is_a_failure() -> None:
    """An exception in the child ends it with a failure, and never returns to the caller."""
    assert run("raise SystemExit(0)") == (70, "qedfuse: internal error: SystemExit: 0\n")
    code, printed = run("return 0", "os.setsid = lambda: 1 / 0")
    assert (code, printed) == (70, "qedfuse: internal error: ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_child_too(name: str) -> None:
    """A signal to the parent ends the child before the parent returns."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'terminated'), os._exit(0)));"
        f"os.kill(os.getppid(), signal.{name}); signal.pause()"
    )
    assert run(body) == (130, "terminated")


def test_an_ignored_signal_stays_ignored() -> None:
    """A SIGHUP that nohup(1) has ignored stays ignored in parent and child."""
    body = "os.kill(os.getppid(), signal.SIGHUP); ready(); return 0"
    assert run(body, "signal.signal(signal.SIGHUP, signal.SIG_IGN)") == (0, "")


def test_a_second_signal_ends_the_parent() -> None:
    """A second signal ends the parent even if the child does not end."""
    body = (
        "parent = os.getppid(); end = os.pidfd_open(parent);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "os.kill(parent, signal.SIGTERM); signal.sigwait([signal.SIGTERM]);"
        "os.kill(parent, signal.SIGHUP); select.select([end], [], [])"
    )
    assert run(body)[0] == -signal.SIGHUP


def test_a_child_without_a_parent_fails() -> None:
    """A child whose parent was killed fails when it becomes ready."""
    body = (
        "parent = os.pidfd_open(os.getppid()); os.kill(os.getppid(), signal.SIGKILL);"
        "select.select([parent], [], []); report = os.dup(1)\n"
        "    try: ready()\n"
        "    except QedError as error: os.write(report, str(error).encode())"
    )
    prelude = "from qedfuse.errors import QedError; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert run(body, prelude) == (-9, "the command that waited for the mount has ended")


def test_a_host_without_room_for_a_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fails with one line, keeps no descriptor open, and blocks no signal."""

    def refuse() -> int:
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = open_descriptors()
    with pytest.raises(HostError) as caught:
        run_in_background(lambda _ready: 0)
    assert open_descriptors() == before
    assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == mask
    reason = "process in the background: cannot start: Resource temporarily unavailable"
    assert (str(caught.value), caught.value.exit_code) == (reason, 2)
