"""The checks of a mountpoint and of privileges, and the reading of the mount table."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qedfuse.errors import MountpointError, PrivilegeError
from qedfuse.mount.system import privileges
from qedfuse.mount.system.mountpoint import check_mountpoint, is_below
from qedfuse.mount.system.mounttable import MountEntry, parse_mounts
from qedfuse.mount.system.privileges import check_privileges

ODD = ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\r", "\xa0", "\x1f"]
"""Characters at which Python ends a line or a word, and the kernel does not."""

TABLE = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:42 / /mnt/a\040b rw,nosuid - fuse.qedfuse /x\054y.qed rw,user_id=1000,group_id=5
41 22 0:43 / /mnt/c rw - fuse.qedfuse x rw
42 22 0:44 / /mnt/d rw master:3 - fuse.qedfuse x rw
43 22 0:45 / /mnt/e rw shared:5 master:4 propagate_from:2 - fuse.qedfuse x rw
broken
"""


def test_the_mount_table_is_read() -> None:
    """Reading the mount table unescapes names, finds the owner and skips malformed lines."""
    assert list(parse_mounts(TABLE)) == [
        MountEntry(22, 1, "8:1", "/", "ext4", "/dev/sda1", 0, 1),
        MountEntry(40, 22, "0:42", "/mnt/a b", "fuse.qedfuse", "/x,y.qed", 1000),
        MountEntry(41, 22, "0:43", "/mnt/c", "fuse.qedfuse", "x", 0),
        MountEntry(42, 22, "0:44", "/mnt/d", "fuse.qedfuse", "x", 0, 0, 3),
        MountEntry(43, 22, "0:45", "/mnt/e", "fuse.qedfuse", "x", 0, 5, 4),
    ]


@pytest.mark.parametrize("char", ODD)
def test_any_character_can_be_in_a_name_of_the_mount_table(char: str) -> None:
    """Any character of a name is read from the mount table as the kernel writes it."""
    line = f"40 22 0:42 / /mnt/a{char}b rw - fuse.qedfuse /{char}.qed rw,user_id=7\n"
    assert list(parse_mounts(line * 2)) == 2 * [
        MountEntry(40, 22, "0:42", f"/mnt/a{char}b", "fuse.qedfuse", f"/{char}.qed", 7)
    ]


def test_fit_mountpoints(tmp_path: Path) -> None:
    """A directory, empty or not, fits any number of disks, and a file fits one."""
    (tmp_path / "file").touch()
    assert check_mountpoint(str(tmp_path), 3)
    assert not check_mountpoint(str(tmp_path / "file"), 1)


def test_unfit_mountpoints(tmp_path: Path) -> None:
    """Each refusal of a mountpoint says what was found and what is expected."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, disks, reason in (
        ("none", 1, "found nothing, expected a directory or a regular file"),
        ("file", 2, "found a file for 2 disks, expected a directory"),
        ("fifo", 1, "found a special file, expected a directory or a regular file"),
        ("file/x", 1, "found a file in place of a directory"),
    ):
        with pytest.raises(MountpointError) as caught:
            check_mountpoint(f"{tmp_path}/{name}", disks)
        assert str(caught.value) == f"mountpoint {tmp_path}/{name}: {reason}"


def test_a_missing_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing /dev/fuse is refused with an explanation."""
    monkeypatch.setattr(privileges, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(PrivilegeError, match="modprobe fuse"):
        check_privileges(for_others=False)


def test_a_forbidden_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /dev/fuse that cannot be opened is refused with the host's reason."""

    def deny(*_args: object) -> int:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(privileges, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", deny)
        with pytest.raises(PrivilegeError, match="Permission denied"):
            check_privileges(for_others=False)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for a device that may be used."""
    path = tmp_path / "fuse"
    path.touch()
    monkeypatch.setattr(privileges, "FUSE_DEVICE", str(path))
    return path


@pytest.mark.usefixtures("device")
def test_a_missing_helper_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing fusermount3 is refused for ordinary users, and does not matter to root."""
    monkeypatch.setattr(privileges, "find_fusermount", lambda: None)
    with pytest.raises(PrivilegeError, match="fusermount3"):
        check_privileges(for_others=False, user=1000)
    check_privileges(for_others=False, user=0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("conf", "allowed"),
    [
        ("", False),
        ("#user_allow_other\n", False),
        ("user_allow_other_not\n", False),
        ("mount_max = 3\n user_allow_other \n", True),
        ("user_allow_other  # for losetup\n", True),
    ],
)
def test_allow_other_needs_a_line_in_the_configuration(
    conf: str,
    allowed: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """allow_other without user_allow_other in fuse.conf is refused with the missing line."""
    path = tmp_path / "fuse.conf"
    path.write_text(conf)
    monkeypatch.setattr(privileges, "FUSE_CONF", str(path))
    monkeypatch.setattr(privileges, "find_fusermount", lambda: "/bin/fusermount3")
    check_privileges(for_others=True, user=0)
    check_privileges(for_others=False, user=1000)
    if allowed:
        check_privileges(for_others=True, user=1000)
    else:
        with pytest.raises(PrivilegeError, match="user_allow_other"):
            check_privileges(for_others=True, user=1000)


@pytest.mark.parametrize(
    "path",
    ["/", "/dev", "/proc", "/proc/self", "/sys", "/sys/class", "/usr", "/usr/bin", "/etc", "/run"],
)
def test_what_the_server_or_libfuse_needs_is_no_mountpoint(path: str) -> None:
    """A mountpoint that covers what the server or libfuse needs is refused."""
    with pytest.raises(MountpointError, match="found a system path"):
        check_mountpoint(path, 1)


def test_the_libraries_of_the_system_are_no_mountpoint() -> None:
    """A mountpoint that covers the system's libraries is refused, since mount(8) needs them."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    (library,) = set(re.findall(r"/\S+/libc\.so\.6", maps))
    with pytest.raises(MountpointError, match="found a system path"):
        check_mountpoint(str(Path(library).parent), 1)


def test_what_leads_through_a_mountpoint() -> None:
    """A path leads through a mountpoint if it is that directory or below it."""
    assert is_below("/a/b", "/a/b")
    assert is_below("/a/b/c", "/a/b")
    assert is_below("/a", "/")
    assert not is_below("/a/bc", "/a/b")
    assert not is_below("/a", "/a/b")
