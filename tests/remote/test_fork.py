"""Stores in a process that was forked after its parent had used one."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

from tests.support.disks import build_image
from tests.support.programs import TREE, environment
from tests.support.webserver import serving

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM: Final = """
import os, signal, sys, warnings
import qedfuse

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
URL = "s3://images/disk.qed"
is_used = sys.argv[1] == "used"

def use():
    with qedfuse.open(URL) as disk:
        print(len(disk.read(4)), flush=True)

if is_used:
    use()
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        use()
    except qedfuse.QedError as error:
        print(error, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
use()
"""


def run(word: str, directory: Path) -> list[str]:
    """Return the lines of the program, which has no cache: a cached object needs no store."""
    no_directory = directory / "file"
    no_directory.touch()
    with serving(bytes(build_image(1 << 20))) as server:
        own = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "XDG_CACHE_HOME": str(no_directory),
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, word],
            capture_output=True, timeout=120, check=True, cwd=TREE, text=True,
            env=environment() | own,
        )  # fmt: skip
    return done.stdout.splitlines()


def test_a_child_of_a_process_that_has_used_a_store(tmp_path: Path) -> None:
    """An opening in the child fails with one line instead of waiting forever."""
    refusal = (
        "s3://images/disk.qed: found a process that was forked after its parent had used a store, "
        "expected the fork before the first use of a store, or a new program (start method spawn)"
    )
    assert run("used", tmp_path) == ["4", refusal, "0", "4"]


def test_a_child_of_a_process_that_has_used_no_store(tmp_path: Path) -> None:
    """A fork before the first use changes nothing, for the child and for the parent."""
    assert run("not used", tmp_path) == ["4", "0", "4"]
