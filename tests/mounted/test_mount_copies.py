"""Unmounting a file system that is mounted elsewhere as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.commands import umount
from qedfuse.mount.commands.umount import UnmountFailedError, unmount_and_wait
from qedfuse.mount.system.mountcopies import find_copies
from qedfuse.mount.system.mounttable import FUSE_TYPE, MountEntry, find_qedfuse_mount, read_mounts
from tests.support import qemu
from tests.support.mounted import clean_up, front, is_mounted, qedfuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SEPARATE: Final = "mount --make-rprivate / 2>/dev/null; "
"""Keeps what is unmounted here mounted there; the root of a chroot is no mount, and fails."""

_CHROOTED_PARENT: Final = """
import os, sys
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
os.chroot(sys.argv[1])
print(child, flush=True)
os.waitpid(child, 0)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image."""
    return qemu.create(tmp_path / "vm.qed", 1 << 20)


@contextmanager
def other_namespace(separate: str = _SEPARATE) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with a mount namespace of its own, in which all mounts have copies."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation=unchanged", "sh", "-c", f"{separate}echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"  # it has its namespace
        yield process


def test_the_other_namespace_is_named_at_once_and_at_the_timeout(
    image: Path, tmp_path: Path
) -> None:
    """Process, name and mountpoint; the wait ends with the copy."""
    lines: list[str] = []
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        copy = f"at {mount.mountpoint} for process {other.pid} (cat)"
        line = (
            f"{mount.mountpoint}: unmounted here, but still mounted {copy}; "
            f"process {mount.process.pid} goes on until that is unmounted"
        )
        with pytest.raises(UnmountFailedError) as caught:
            unmount_and_wait(str(mount.mountpoint), 1.5, lines.append)
        assert lines == [line]
        assert str(caught.value) == f"{line} (waited 1.5 s)"
        assert not is_mounted(mount.mountpoint)
        other.communicate()
        assert mount.finish()[0] == 0


def test_a_bind_mount_is_named_and_umount_returns_when_it_has_gone(
    image: Path, tmp_path: Path
) -> None:
    """In the same namespace no process is named, and no mount that goes away with it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "bind").touch()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        subprocess.run(["umount", shared / "bind"], check=True)

    subprocess.run(["mount", "--bind", shared, shared], check=True)
    try:
        subprocess.run(["mount", "--make-shared", shared], check=True)
        with other_namespace("") as other, front(image, tmp_path / "mnt") as mount:
            disk = mount.mountpoint / "vm.raw"
            subprocess.run(["mount", "--bind", disk, shared / "bind"], check=True)
            assert [entry.path for entry in read_mounts(other.pid)].count(f"{shared}/bind") == 1
            unmount_and_wait(str(mount.mountpoint), None, report)
            assert mount.finish()[0] == 0
            other.communicate()
    finally:
        clean_up(shared / "bind")
        clean_up(shared)
    line = f"{mount.mountpoint}: unmounted here, but still mounted at {shared}/bind; "
    assert lines == [line + f"process {mount.process.pid} goes on until that is unmounted"]


def test_a_signal_says_so_in_the_log_and_a_second_one_ends_it(image: Path, tmp_path: Path) -> None:
    """The server tells the same to whoever reads its log."""
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        mount.signal(signal.SIGTERM)
        line = mount.read_line()
        assert f"still mounted at {mount.mountpoint} for process {other.pid} (cat)" in line
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
        other.communicate()
    assert qemu.check(image).code == 0


def test_the_command_prints_it(image: Path, tmp_path: Path) -> None:
    """With a timeout below the moment only the last line comes."""
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        done = qedfuse("umount", mount.mountpoint, "--timeout", "0.1")
        assert done.returncode == 32
        assert done.stderr.count("\n") == 1
        assert f"for process {other.pid} (cat)" in done.stderr
        other.communicate()
        assert mount.finish()[0] == 0
        assert os.path.exists(mount.mountpoint)  # noqa: PTH110


def test_a_reason_that_cannot_be_seen_is_reported_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Later, and without a place; the wait goes on until the process ends."""
    for name in ("_MOMENT_SECONDS", "_LONG_SECONDS"):
        monkeypatch.setattr(umount, name, 0.0)
    lines: list[str] = []
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:

        def report(line: str) -> None:
            lines.append(line)
            process.communicate()

        descriptor = os.pidfd_open(process.pid)
        try:
            # No file system has this number.
            entry = MountEntry(1, 1, "9999:9999", "/mnt", FUSE_TYPE, "/vm.qed", 0)
            assert umount._Ending(descriptor, process.pid, entry).wait(None, report)
        finally:
            os.close(descriptor)
    assert len(lines) == 1
    assert lines[0].startswith(f"unmounted, but process {process.pid} has not ended: it writes, ")
    assert "a copy in a mount namespace that cannot be seen (SIGTERM twice" in lines[0]


def test_a_copy_is_found_where_the_first_process_sees_nothing_of_it(
    image: Path, tmp_path: Path
) -> None:
    """A mount table shows only what is below the root of its process, so all are asked."""
    place = tmp_path / "chroot"
    place.mkdir()
    command = f"{_SEPARATE} exec {sys.executable} -c '{_CHROOTED_PARENT}' {place}"
    with front(image, tmp_path / "mnt") as mount:
        device = find_qedfuse_mount(str(mount.mountpoint)).device
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation=unchanged", "sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert all(entry.device != device for entry in read_mounts(parent.pid))
            copies = [copy for copy in find_copies(device) if copy.pid in (child, parent.pid)]
            parent.communicate()
    assert [(copy.path, copy.pid) for copy in copies] == [(str(mount.mountpoint), child)]


def test_a_new_mount_with_the_same_number_is_no_copy(image: Path, tmp_path: Path) -> None:
    """The kernel gives the number away while the old process is still closing its images."""
    with front(image, tmp_path / "mnt") as mount, subprocess.Popen(["cat"], stdin=-1) as old:
        entry = find_qedfuse_mount(str(mount.mountpoint))
        descriptor = os.pidfd_open(old.pid)
        try:
            # The note says whose it is now, and of another user's mount the table does.
            assert "still mounted" not in umount._Ending(descriptor, old.pid, entry).describe()
            other = replace(entry, source="/other.qed")
            assert find_copies(entry.device)
            assert not find_copies(entry.device, other)
            itself = umount._Ending(descriptor, mount.process.pid, entry)
            assert f"still mounted at {mount.mountpoint}; " in itself.describe()
        finally:
            os.close(descriptor)
        old.communicate()
