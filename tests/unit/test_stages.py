"""tests/stages.sh: stages of tests/run.sh run side by side, and each of them counts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Final

STAGES: Final = Path(__file__).parents[1] / "stages.sh"
TIMEOUT: Final = 60.0

_BEGIN: Final = """
set -eu
say() { echo "== $*"; }
. "$1"
cd "$2"
"""


def start(script: str, directory: Path) -> subprocess.Popen[str]:
    """Start a bash script that uses the stages, in a directory."""
    return subprocess.Popen(
        ["bash", "-c", _BEGIN + script, "run.sh", STAGES, directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(script: str, directory: Path) -> tuple[int, str]:
    """Run a bash script that uses the stages; return its exit code and what it prints."""
    with start(script, directory) as process:
        printed, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, printed


def test_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    """All stages run, the summary names the one that failed, and so does the exit code."""
    code, printed = run(
        """
        first() { echo from the first; }
        bad_one() { echo before; false; echo after; }
        last() { echo from the last >&2; }
        run_lanes first "bad_one last"
        """,
        tmp_path,
    )
    assert code == 1
    assert "== bad one\nbefore\n" in printed
    assert "after" not in printed
    assert "== last\nfrom the last\n" in printed
    summary = printed.partition("== Stages\n")[2]
    found = re.findall(r"^(first|bad one|last) +(passed|FAILED) +\d+ +\d+$", summary, re.MULTILINE)
    assert found == [("first", "passed"), ("bad one", "FAILED"), ("last", "passed")]


def test_lanes_run_side_by_side_and_print_apart(tmp_path: Path) -> None:
    """Two stages that wait for each other both end, and the lines of each are together."""
    os.mkfifo(tmp_path / "there")
    os.mkfifo(tmp_path / "back")
    code, printed = run(
        """
        left() { echo left 1; echo >there; read -r _ <back; echo left 2; }
        right() { echo right 1; read -r _ <there; echo >back; echo right 2; }
        run_lanes left right
        """,
        tmp_path,
    )
    assert code == 0, printed
    assert "== left\nleft 1\nleft 2\n" in printed
    assert "== right\nright 1\nright 2\n" in printed


def test_a_signal_ends_the_programs_of_all_lanes(tmp_path: Path) -> None:
    """SIGTERM ends what the stages have started, and no later stage begins."""
    os.mkfifo(tmp_path / "alive")
    with start(
        """
        waits() { exec 3>alive; echo >&3; exec sleep 1000; }
        never() { touch never; }
        run_lanes "waits never"
        """,
        tmp_path,
    ) as process:
        with (tmp_path / "alive").open(encoding="utf-8") as alive:
            assert alive.readline() == "\n"
            process.send_signal(signal.SIGTERM)
            assert alive.read() == "", "until the last program has ended"
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143
    assert not (tmp_path / "never").exists()
