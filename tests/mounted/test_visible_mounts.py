"""Unmounting a file system that is also mounted elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.commands import serverprocess
from qedfuse.mount.commands.umount import UnmountFailedError, unmount_and_wait
from qedfuse.mount.system import visiblemounts
from qedfuse.mount.system.mounttable import FUSE_TYPE, MountEntry, find_qedfuse_mount, read_mounts
from qedfuse.mount.system.visiblemounts import find_visible_mounts
from tests.support import qemu
from tests.support.mounted import clean_up, front, is_mounted, qedfuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SEPARATE: Final = "mount --make-rprivate / 2>/dev/null; "
"""Keeps the copies when the originals are unmounted; fails where / is no mount (a chroot)."""

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

_COPIES: Final = """
import sys
from qedfuse.mount.system.visiblemounts import find_visible_mounts
for copy in find_visible_mounts(sys.argv[1]):
    print(copy.path, copy.pid)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image."""
    return qemu.create(tmp_path / "vm.qed", 1 << 20)


@contextmanager
def other_namespace(separate: str = _SEPARATE) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in its own mount namespace, which has copies of all mounts."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation=unchanged", "sh", "-c", f"{separate}echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"  # it has its namespace
        yield process


def test_a_copy_in_another_namespace_is_reported(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process, name and mountpoint of a copy are reported first and again at the timeout."""
    # The unmount takes a part of the time limit, so the report must not wait for a part of it too.
    monkeypatch.setattr(serverprocess, "_OTHER_MOUNTS_REPORT_SECONDS", 0.0)
    lines: list[str] = []
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        copy = f"at {mount.mountpoint} for process {other.pid} (cat)"
        line = (
            f"{mount.mountpoint}: unmounted here, but still mounted {copy}; "
            f"process {mount.process.pid} goes on until no mount is left"
        )
        with pytest.raises(UnmountFailedError) as caught:
            unmount_and_wait(str(mount.mountpoint), 2.5, lines.append)
        assert lines == [line]
        assert str(caught.value) == f"{line} (waited 2.5 s)"
        assert not is_mounted(mount.mountpoint)
        other.communicate()
        assert mount.finish()[0] == 0


def test_a_bind_mount_is_reported_and_waited_for(image: Path, tmp_path: Path) -> None:
    """A bind mount is reported without a process, and the unmount returns when it is gone."""
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
    assert lines == [line + f"process {mount.process.pid} goes on until no mount is left"]


GROUPS: Final = {
    "shared": (1, 0),
    "slave": (0, 1),
    "shared slave": (2, 1),
    "slave of the slave": (0, 2),
    "private": (0, 0),
}
"""Kinds of mounts by propagation, each with its peer group and the group of its master."""


@pytest.mark.parametrize(
    ("own", "reported"),
    [
        ("shared", {"private"}),
        ("slave", set(GROUPS)),
        ("shared slave", {"shared", "slave", "private"}),
        ("slave of the slave", set(GROUPS)),
        ("private", set(GROUPS)),
    ],
)
def test_only_mounts_that_the_unmount_does_not_reach_are_reported(
    own: str, reported: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmount reaches the peers, the slaves and their slaves, and never the master."""
    kinds = (own, *GROUPS)

    def table(process: int | None = None) -> list[MountEntry]:
        number = process or 0
        kind = kinds[number]
        return [MountEntry(number, 1, "0:42", kind, FUSE_TYPE, "x", 0, *GROUPS[kind])]

    monkeypatch.setattr(visiblemounts, "read_mounts", table)
    monkeypatch.setattr(visiblemounts, "_namespace_and_root", lambda process: (process, ""))
    monkeypatch.setattr(os, "listdir", lambda _path: [str(pid) for pid in range(1, len(kinds))])
    first, *others = find_visible_mounts("0:42")
    assert (first.path, first.pid) == (own, None)
    assert {copy.path for copy in others} == reported


def test_a_process_that_ends_hides_no_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a process ends while it is asked, another one of the same namespace is asked."""
    asked: list[int] = []

    def table(process: int | None = None) -> list[MountEntry]:
        if process is None:
            return []
        asked.append(process)
        if process == 5:
            raise ProcessLookupError
        return [MountEntry(1, 1, "0:42", "/mnt", FUSE_TYPE, "x", 0)]

    monkeypatch.setattr(visiblemounts, "read_mounts", table)
    monkeypatch.setattr(visiblemounts, "_namespace_and_root", lambda name: (name == "self", ""))
    monkeypatch.setattr(os, "listdir", lambda _path: ["5", "7", "9"])
    assert [(copy.path, copy.pid) for copy in find_visible_mounts("0:42")] == [("/mnt", 7)]
    assert asked == [5, 7]


def test_the_master_of_a_slave_is_reported(image: Path, tmp_path: Path) -> None:
    """In a namespace of slaves, the mount in the first namespace is reported as a copy."""
    shared = tmp_path / "shared"
    shared.mkdir()
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    try:
        subprocess.run(["mount", "--make-shared", shared], check=True)
        with front(image, shared / "mnt") as mount:
            device = find_qedfuse_mount(str(mount.mountpoint)).device
            done = subprocess.run(
                [
                    "unshare",
                    "--mount",
                    "--propagation=slave",
                    sys.executable,
                    "-c",
                    _COPIES,
                    device,
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            mount.process.terminate()
            assert mount.finish()[0] == 0
    finally:
        clean_up(shared)
    own, *others = done.stdout.splitlines()
    assert own == f"{mount.mountpoint} None"
    assert [line.rpartition(" ")[0] for line in others] == [str(mount.mountpoint)]


def test_a_signal_logs_the_copy_and_a_second_one_ends_the_mount(
    image: Path, tmp_path: Path
) -> None:
    """SIGTERM logs the process that has a copy, and a second SIGTERM ends the server."""
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        mount.signal(signal.SIGTERM)
        line = mount.read_line()
        assert f"still mounted at {mount.mountpoint} for process {other.pid} (cat)" in line
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
        other.communicate()
    assert qemu.check(image).code == 0


def test_a_signal_makes_disks_durable_that_are_in_use_through_a_bind_mount(
    image: Path, tmp_path: Path
) -> None:
    """What a program has written through another mount is durable when SIGTERM is logged."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with front(image, tmp_path / "mnt") as mount:
        subprocess.run(["mount", "--bind", mount.mountpoint, elsewhere], check=True)
        try:
            with (elsewhere / "vm.raw").open("r+b", buffering=0) as disk:
                disk.write(b"x" * 70000)
                mount.signal(signal.SIGTERM)
                line = mount.read_line()
                assert f"still mounted at {elsewhere}; everything is durable now; " in line
                assert b"x" * 70000 in image.read_bytes()
        finally:
            clean_up(elsewhere)
        assert mount.finish()[0] == 0


def test_umount_prints_the_copy(image: Path, tmp_path: Path) -> None:
    """An unmount by the command with a short timeout prints one line and exits with 32."""
    with front(image, tmp_path / "mnt") as mount, other_namespace() as other:
        done = qedfuse("umount", mount.mountpoint, "--timeout", "0.1")
        assert done.returncode == 32
        assert done.stderr.count("\n") == 1
        assert f"for process {other.pid} (cat)" in done.stderr
        other.communicate()
        assert mount.finish()[0] == 0
        assert os.path.exists(mount.mountpoint)  # noqa: PTH110


def test_a_server_that_goes_on_without_a_visible_copy_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If no copy is found, one line lists the possible reasons and the wait goes on."""
    for name in ("_OTHER_MOUNTS_REPORT_SECONDS", "_REPORT_SECONDS"):
        monkeypatch.setattr(serverprocess, name, 0.0)
    lines: list[str] = []
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:

        def report(line: str) -> None:
            lines.append(line)
            process.communicate()

        descriptor = os.pidfd_open(process.pid)
        try:
            # No file system has this number.
            entry = MountEntry(1, 1, "9999:9999", "/mnt", FUSE_TYPE, "/vm.qed", 0)
            assert serverprocess.ServerProcess(descriptor, process.pid, entry).wait(None, report)
        finally:
            os.close(descriptor)
    assert len(lines) == 1
    assert lines[0].startswith(
        f"unmounted, but process {process.pid} has not ended: the process is "
    )
    assert "a copy in a mount namespace that is not visible here" in lines[0]


def test_copies_are_found_for_all_processes_of_a_namespace(image: Path, tmp_path: Path) -> None:
    """A copy is found if only one process sees it: mount tables end at each process's root."""
    chroot = tmp_path / "chroot"
    chroot.mkdir()
    command = f"{_SEPARATE} exec {sys.executable} -c '{_CHROOTED_PARENT}' {chroot}"
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
            found = find_visible_mounts(device)
            copies = [entry for entry in found if entry.pid in (child, parent.pid)]
            parent.communicate()
    assert [(copy.path, copy.pid) for copy in copies] == [(str(mount.mountpoint), child)]


def test_a_new_mount_with_the_same_device_number_is_no_copy(image: Path, tmp_path: Path) -> None:
    """A later mount that got the old device number is not taken for a copy."""
    with front(image, tmp_path / "mnt") as mount, subprocess.Popen(["cat"], stdin=-1) as old:
        entry = find_qedfuse_mount(str(mount.mountpoint))
        descriptor = os.pidfd_open(old.pid)
        try:
            # The mount record names the owner; for another user's mount the mount table does.
            assert (
                "still mounted"
                not in serverprocess.ServerProcess(descriptor, old.pid, entry).describe()
            )
            other = replace(entry, source="/other.qed")
            assert find_visible_mounts(entry.device)
            assert not find_visible_mounts(entry.device, other)
            itself = serverprocess.ServerProcess(descriptor, mount.process.pid, entry)
            assert f"still mounted at {mount.mountpoint}; " in itself.describe()
        finally:
            os.close(descriptor)
        old.communicate()
