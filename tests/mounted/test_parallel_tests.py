"""Tests that run in parallel do not disturb each other's mounts."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.mounted import TIMEOUT, is_mounted, mounted, qedfuse
from tests.support.programs import environment

if TYPE_CHECKING:
    from pathlib import Path

_BESIDE: Final = """
import sys
from qedfuse.mount.system.recorddirectory import record_directories
from tests.support.mounted import is_mounted, mounted
from tests.support.mountnamespace import enter_own_namespace
_, theirs, image, mountpoint = sys.argv
assert is_mounted(theirs)
if not enter_own_namespace():
    sys.exit("SKIP")
assert not is_mounted(theirs)
assert not any(any(directory.iterdir()) for directory in record_directories(0))
with mounted(image, mountpoint):
    assert is_mounted(mountpoint)
    print("mounted", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_mounts_of_two_test_processes_are_separate(tmp_path: Path) -> None:
    """A test process neither sees nor holds the mounts of others, and not their records."""
    for name in ("a", "b"):
        qemu.create(tmp_path / f"{name}.qed", 1 << 20)
    mnt, beside = tmp_path / "mnt", tmp_path / "beside"
    with (
        mounted(tmp_path / "a.qed", mnt),
        subprocess.Popen(
            [sys.executable, "-c", _BESIDE, mnt, tmp_path / "b.qed", beside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line and "SKIP" in process.communicate()[1]:
            pytest.skip("the root directory is no mount, or namespaces are not permitted")
        assert line == "mounted\n"
        assert not is_mounted(beside)
        done = qedfuse("umount", mnt)
        assert (done.returncode, done.stderr) == (0, "")
        assert qedfuse(tmp_path / "a.qed", mnt).returncode == 0  # for the end of the block
        assert process.communicate()[1] == ""
        assert process.returncode == 0


_KILLED: Final = """
import sys
from tests.support.mounted import mounted
from tests.support.mountnamespace import enter_own_namespace
_, image, mountpoint, pidfile = sys.argv
if not enter_own_namespace():
    sys.exit("SKIP")
with mounted(image, mountpoint, "--pidfile", pidfile):
    print("mounted", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_servers_of_a_killed_test_process_end(tmp_path: Path) -> None:
    """A test process that is killed leaves no server, although the server sees its own mount."""
    qemu.create(tmp_path / "a.qed", 1 << 20)
    pidfile = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, tmp_path / "a.qed", tmp_path / "mnt", pidfile],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline() and "SKIP" in process.communicate()[1]:
            pytest.skip("the root directory is no mount, or namespaces are not permitted")
        server = os.pidfd_open(int(pidfile.read_text("utf-8")))
        try:
            process.kill()
            assert select.select([server], [], [], TIMEOUT)[0], "the server goes on"
        finally:
            os.close(server)
