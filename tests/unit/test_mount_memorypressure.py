"""The serving process joins the kernel's writeback path where that is permitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any, Final

import pytest

from qedfuse.mount.process.memorypressure import OOM_SCORE_ADJ
from tests.support.mounted import IO_FLUSHER, TIMEOUT, UNPROTECTED, may_be_io_flusher
from tests.support.programs import environment

_PROGRAM: Final = f"""
import json, os, subprocess, sys, threading
from pathlib import Path
from qedfuse.mount.process.memorypressure import protect_from_memory_pressure

def flags(task):
    return int(Path(f"/proc/{{task}}/stat").read_text().rpartition(")")[2].split()[6])

adj = Path("/proc/self/oom_score_adj")
before = flags("thread-self")
if len(sys.argv) > 1:
    adj.write_text(sys.argv[1])
result = {{"refused": protect_from_memory_pressure(), "before": before & {IO_FLUSHER}}}
tasks = {{"main": flags("thread-self")}}
thread = threading.Thread(target=lambda: tasks.update(thread=flags("thread-self")))
thread.start()
thread.join()
tasks["child"] = int(subprocess.run(
    ["cut", "-d ", "-f9", "/proc/self/stat"], capture_output=True, check=True).stdout)
result["tasks"] = {{name: value & {IO_FLUSHER} for name, value in tasks.items()}}
result["adj"] = int(adj.read_text())
print(json.dumps(result))
"""


def protect(*arguments: str, before: tuple[str, ...] = ()) -> Any:  # noqa: ANN401  from JSON
    """Protect a process; give what was refused and what its threads and children have."""
    done = subprocess.run(
        [*before, sys.executable, "-c", _PROGRAM, *arguments],
        capture_output=True, text=True, timeout=TIMEOUT, env=environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_protected_exactly_where_the_capability_is() -> None:
    """All threads and children get the flag, or one line says which capability is missing."""
    found = protect()
    permitted = may_be_io_flusher()
    assert found["before"] == 0
    assert found["tasks"] == dict.fromkeys(
        ("main", "thread", "child"), IO_FLUSHER if permitted else 0
    )
    assert (found["refused"] is None) == permitted
    assert found["adj"] == (OOM_SCORE_ADJ if permitted and os.geteuid() == 0 else 0)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can drop a capability"
)
@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_a_refusal_is_one_line_and_harms_nothing(user: str) -> None:
    """A refusal is one line that names what was refused, and leaves the OOM score unchanged."""
    drop = "--bounding-set -sys_resource"
    if user == "ordinary":
        drop = "--reuid 65534 --regid 65534 --clear-groups"
    found = protect(before=("setpriv", *drop.split()))
    line = found["refused"]
    assert line.startswith(f"{UNPROTECTED}: PR_SET_IO_FLUSHER: Operation not permitted")
    assert ("oom_score_adj: Permission denied" in line) == (user == "root")
    assert "CAP_SYS_RESOURCE" in line
    assert "\n" not in line
    assert set(found["tasks"].values()) == {0}
    assert found["adj"] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's score is lowered")
def test_a_chosen_oom_score_is_kept() -> None:
    """An OOM score that the administrator has set is not overwritten."""
    found = protect("200")
    assert found["adj"] == 200
    assert "oom_score_adj" not in (found["refused"] or "")
