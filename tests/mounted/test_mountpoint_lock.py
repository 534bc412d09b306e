"""Two mounts of one mountpoint at the same time."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import pytest

from qedfuse.errors import FuseError, HostError, MountpointError
from qedfuse.mount.system import mountpointlock
from qedfuse.mount.system.mountpointlock import (
    find_new_mount,
    mountpoint_lock_name,
    mountpoint_locked,
    refuse_to_cover,
)
from qedfuse.mount.system.mounttable import MountEntry, read_mounts
from tests.support import qemu
from tests.support.mounted import TIMEOUT, command_line, is_locked, without_notice
from tests.support.programs import environment

if TYPE_CHECKING:
    from trio.testing import MockClock


_PATIENCE: Final = """
from qedfuse.mount.system import mountpointlock
mountpointlock._MAX_WAIT_SECONDS = 600.0
"""
"""Lets a mount wait for the lock until the other one has started, also on a busy machine."""


def hold(mountpoint: Path) -> socket.socket:
    """Take the lock of a mountpoint."""
    name = mountpoint_lock_name(str(mountpoint))
    assert name is not None
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(name)
    except OSError:
        taken.close()
        raise
    return taken


def start(image: Path, mountpoint: Path) -> subprocess.Popen[str]:
    """Start a mount in the background; return when it has checked the mountpoint."""
    process = subprocess.Popen(
        [*command_line(_PATIENCE), image, mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    end = time.monotonic() + TIMEOUT
    while not is_locked(image):  # images are opened after the first look at the mountpoint
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the image was not opened"
        time.sleep(0.01)
    return process


def test_one_of_two_concurrent_mounts_is_refused(tmp_path: Path, mnt: Path) -> None:
    """Of two concurrent mounts that found the mountpoint free, one mounts and one exits with 18."""
    (tmp_path / "other").symlink_to(tmp_path)
    images = [qemu.create(tmp_path / f"{name}.qed", 1 << 20) for name in "ab"]
    with hold(mnt):
        processes = [start(images[0], mnt), start(images[1], tmp_path / "other" / "mnt")]
    said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 18], said
    winner = codes.index(0)
    assert os.listdir(mnt) == [f"{'ab'[winner]}.raw"]  # noqa: PTH208  the names
    assert without_notice(said[winner]) == ""
    assert said[1 - winner] == (
        f"qedfuse: mountpoint {mnt}: in use: found another qedfuse mount "
        f"(to end that mount: qedfuse umount {mnt})\n"
    )
    assert [entry.source for entry in read_mounts() if entry.path == str(mnt)] == [
        str(images[winner])
    ]


async def test_waiting_for_the_lock_is_limited(mnt: Path, autojump_clock: MockClock) -> None:
    """A lock that another process keeps is waited for 5 seconds only: any user could take it."""
    before = autojump_clock.current_time()
    with hold(mnt):
        async with mountpoint_locked(mountpoint_lock_name(str(mnt))):
            assert 4 < autojump_clock.current_time() - before < 6
    # At the end of the block the lock is free again.
    async with mountpoint_locked(mountpoint_lock_name(str(mnt))):
        with pytest.raises(OSError, match="in use"):
            hold(mnt)
    hold(mnt).close()
    assert mountpoint_lock_name(str(mnt / "none")) is None


def test_the_new_mount_is_found_in_the_mount_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new mount is found by its device; one that covers another qedfuse mount is refused."""
    below = MountEntry(7, 1, "0:50", "/m", "fuse.qedfuse", "/a.qed", 0)
    ours = MountEntry(8, 7, "0:51", "/m", "fuse.qedfuse", "/b.qed", 0)
    above = MountEntry(9, 8, "0:52", "/m", "fuse.qedfuse", "/c.qed", 0)
    monkeypatch.setattr(mountpointlock, "read_mounts", lambda: [below, ours, above])
    monkeypatch.setattr(mountpointlock, "_device", lambda _connection: "0:51")
    assert find_new_mount("/m", [below], 0) == ours
    # The id may be that of a mount that has ended meanwhile.
    ended = replace(ours, path="/other", device="0:40")
    assert find_new_mount("/m", [below, ended], 0) == ours
    assert find_new_mount("/m", [below, replace(ended, path="/m")], 0) == ours
    with pytest.raises(FuseError, match="found no mount after mounting"):
        find_new_mount("/other", [below], 0)
    # The device is not known before Linux 6.11.
    monkeypatch.setattr(mountpointlock, "_device", lambda _connection: None)
    assert find_new_mount("/m", [below, ours], 0) == above
    assert find_new_mount("/m", [below, ours, replace(above, path="/other")], 0) == above
    with pytest.raises(FuseError, match="found no mount after mounting"):
        find_new_mount("/m", [below, ours, above], 0)
    refuse_to_cover(below)
    with pytest.raises(MountpointError, match="/m: in use"):
        refuse_to_cover(ours)
    # Other file systems may lie below, and ours elsewhere.
    other = [MountEntry(7, 1, "0:50", "/m", "fuse.bindfs", "/x", 0)]
    monkeypatch.setattr(mountpointlock, "read_mounts", lambda: other)
    refuse_to_cover(ours)


def test_a_missing_proc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc, the search for the new mount fails with a line that says so."""

    def fail(_path: Path) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(HostError, match="/proc: found no proc file system"):
        find_new_mount("/mnt", [], 0)
