"""A forked process of the tests is like one that was started by a new interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import forkserver, programs

if TYPE_CHECKING:
    from pathlib import Path

REPORT = """
import os, signal, sys
print(sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), os.environ.get("TAKEN"))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, "json" in sys.modules)
numbers = sorted(map(int, os.listdir("/proc/self/fd")))
print([number for number in numbers if os.path.exists(f"/proc/self/fd/{number}")], file=sys.stderr)
os.write(int(sys.argv[1]), b"passed")
sys.exit(7)
"""


def start(code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> forkserver.ForkedProcess:
    """Start a forked process with both pipes."""
    environment = {**os.environ, "GIVEN": "yes"}
    environment.pop("TAKEN", None)
    return forkserver.start(
        code,
        arguments,
        ["json"],
        environment=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
    )


def test_what_a_process_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the arguments, directory, variables and descriptors that were given, and no others."""
    monkeypatch.setenv("TAKEN", "yes")
    reading, writing = os.pipe()
    process = start(REPORT, str(writing), "two", pass_fds=(writing,))
    os.close(writing)
    out, complaint = process.communicate(timeout=60)
    assert os.read(reading, 9) == b"passed"
    os.close(reading)
    assert process.returncode == 7
    assert out == f"['{writing}', 'two'] / yes None\nTrue True\n"
    assert complaint == f"{[0, 1, 2, writing]}\n"


def test_a_signal_ends_it() -> None:
    """The exit code after a signal is negative, and only that process ends."""
    other = start("import signal\nprint(1, flush=True)\nsignal.pause()")
    process = start("print(2, flush=True)\nimport signal\nsignal.pause()")
    assert process.stdout is not None
    assert process.stdout.readline() == "2\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    assert other.stdout is not None
    assert other.stdout.readline() == "1\n"
    assert other.poll() is None
    other.kill()
    assert other.communicate(timeout=60) == ("", "")
    assert other.returncode == -signal.SIGKILL
    process.close()


def test_an_exception_prints_a_traceback() -> None:
    """An exception that is not caught ends it with code 1."""
    process = start("1 / 0")
    out, complaint = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert complaint.startswith("Traceback")
    assert complaint.endswith("ZeroDivisionError: division by zero\n")


ENDS = {
    "nothing": ("pass", 0, "", ""),
    "functions of atexit": ("atexit.register(print, 'at exit')", 0, "at exit\n", ""),
    "threads": ("threading.Timer(0.05, print, ['late']).start()", 0, "late\n", ""),
    "None": ("print(1); sys.exit()", 0, "1\n", ""),
    "a large number": ("sys.exit(258)", 2, "", ""),
    "a negative number": ("sys.exit(-1)", 255, "", ""),
    "a text": ("print(1); sys.exit('text')", 1, "1\n", "text\n"),
    "an open file": ("file = open('/dev/null'); sys.exit(4)", 4, "", "unclosed file"),
    "an open file in a cycle": (
        "loop = [open('/dev/null')]; loop.append(loop); del loop",
        0,
        "",
        "unclosed file",
    ),
    "an open file of a function": (
        "def use():\n file = open('/dev/null')\n sys.exit(3)\nuse()",
        3,
        "",
        "unclosed file",
    ),
    "a full device": (
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print(1); sys.exit(0)",
        120,
        "",
        "No space left on device",
    ),
    "a closed stream": ("sys.stdout.close(); sys.exit(5)", 5, "", ""),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("new", [False, True], ids=["forked", "new interpreter"])
def test_how_a_process_ends(name: str, *, new: bool) -> None:
    """What code and a program can notice of the end is like that of a new interpreter."""
    code, exit_code, out, complaint = ENDS[name]
    code = f"import atexit, os, sys, threading\n{code}"
    if new:
        done = subprocess.run(
            [sys.executable, "-EWerror", "-c", code], capture_output=True, text=True, check=False
        )
        found = (done.returncode, done.stdout, done.stderr)
    else:
        process = start(code)
        streams = process.communicate(timeout=60)
        found = (process.wait(), *streams)
    assert found[:2] == (exit_code, out), found
    assert complaint in found[2]
    assert complaint or not found[2]


@pytest.mark.parametrize("more", [{}, {"prelude": "pass"}, {"variables": {"PYTHONUTF8": "1"}}])
def test_only_plain_starts_are_forked(more: dict[str, str], tmp_path: Path) -> None:
    """Code that runs before the modules load, or a variable of Python, needs a new interpreter."""
    process = programs.start("qedfuse", ["--version"], cwd=tmp_path, **more)  # type: ignore[arg-type]
    out, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    assert out.startswith("qedfuse ")
    forked = isinstance(process, forkserver.ForkedProcess)
    assert forked == (not more and not forkserver.NEW_INTERPRETERS)
