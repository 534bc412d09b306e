"""``mount -o remount``, and options of mount(8) that it hands over."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.optionparser import KERNEL_FLAGS
from tests.support import extensions, qemu
from tests.support.mounted import mounted, qedfuse, refused, without_notice
from tests.support.programs import environment
from tests.support.sandbox import ROOT, make_environment, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image."""
    return qemu.create(tmp_path / "vm.qed", DISK_BYTES)


def test_a_disk_becomes_read_only_and_writable_again(image: Path, tmp_path: Path) -> None:
    """remount,ro makes the kernel refuse writes, remount,rw allows them, and data stays."""
    with mounted(image, tmp_path / "mnt", "-o", "growable,cache_size=1M") as mnt:
        disk = mnt / "vm.raw"
        with disk.open("r+b") as file:
            file.write(b"before")
        for option, is_writable in (
            ("remount,ro", False),
            ("remount,ro,growable", False),
            ("remount,rw", True),
            ("remount,rw,noexec,nosymfollow,noatime,user_id=0,group_id=0", True),
        ):
            done = qedfuse("-o", option, image, mnt)
            assert (done.returncode, done.stderr) == (0, "")
            flags = os.statvfs(mnt).f_flag
            assert bool(flags & os.ST_RDONLY) is not is_writable
            assert flags & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV
            if is_writable:
                disk.open("r+b").close()
            else:
                with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                    disk.open("r+b")
            assert disk.read_bytes()[:6] == b"before"
        assert os.statvfs(mnt).f_flag & (os.ST_NOEXEC | os.ST_NOATIME)
    assert qemu.content(image)[:6] == b"before"


def test_a_remount_refuses_other_changes(image: Path, tmp_path: Path) -> None:
    """A remount that would change another option fails with one line and changes nothing."""
    with mounted(image, tmp_path / "mnt") as mnt:
        line = refused("-o", "remount,growable", mnt, code=1)
        assert line == (
            f"{mnt}: option growable: cannot be changed by remount (unmount, and mount again)"
        )
        assert "option allow_other: cannot be" in refused("-o", "remount,allow_other", mnt, code=1)
        assert "option frob: unknown" in refused("-o", "remount,frob", mnt, code=1)
        with (mnt / "vm.raw").open("r+b"):
            line = refused("-o", "remount,ro", mnt, code=18)
            assert "cannot remount: in use: a loop device or a program has a disk open" in line
        assert not os.statvfs(mnt).f_flag & os.ST_RDONLY
    with mounted(image, tmp_path / "mnt", "-r") as mnt:
        line = refused("-o", "remount,rw", mnt, code=1)
        assert line == (
            f"{mnt}: cannot become writable: found images that are open read-only (unmount, and "
            "mount again with rw)"
        )
        assert os.statvfs(mnt).f_flag & os.ST_RDONLY
        assert qedfuse("-o", "remount,ro,noexec", mnt).returncode == 0
    assert "found no mount" in refused("-o", "remount,ro", mnt, code=18)
    assert "expected fuse.qedfuse" in refused("-o", "remount,ro", "/proc", code=18)


def test_dirsync_cannot_be_set(image: Path, tmp_path: Path) -> None:
    """A remount that would set dirsync, which the kernel ignores then, is refused."""
    mnt = tmp_path / "mnt"
    for options, accepted, refusal in (
        ("rw", "ro", ("ro,dirsync", "set by remount (unmount")),
        ("dirsync", "ro,dirsync", None),
        ("dirsync", "ro", None),
    ):
        with mounted(image, mnt, "-o", options):
            if refusal is not None:
                line = refused("-o", f"remount,{refusal[0]}", mnt, code=1)
                assert line.startswith(f"{mnt}: option dirsync: cannot be {refusal[1]}")
            assert not os.statvfs(mnt).f_flag & os.ST_RDONLY
            assert qedfuse("-o", f"remount,{accepted}", mnt).returncode == 0
            assert os.statvfs(mnt).f_flag & os.ST_RDONLY


def test_sync_cannot_change_with_direct_io(image: Path, tmp_path: Path) -> None:
    """A remount that would change sync is refused with direct_io, and accepted without it."""
    mnt = tmp_path / "mnt"
    for options, accepted, refusal in (
        ("direct_io", "ro", ("rw,sync", "set by remount with direct_io (unmount")),
        ("direct_io,sync", "ro,sync", ("rw", "cleared by remount with direct_io (repeat sync, or")),
        ("direct_io,sync", "sync", ("sync,async", "cleared by remount with direct_io")),
    ):
        with mounted(image, mnt, "-o", options):
            is_sync = "sync" in options
            line = refused("-o", f"remount,{refusal[0]}", mnt, code=1)
            assert line.startswith(f"{mnt}: option sync: cannot be {refusal[1]}")
            assert has_flag(mnt, os.ST_SYNCHRONOUS) is is_sync
            assert qedfuse("-o", f"remount,{accepted}", mnt).returncode == 0
            assert has_flag(mnt, os.ST_SYNCHRONOUS) is is_sync
    with mounted(image, mnt):
        for options in ("rw,sync", "rw"):
            assert qedfuse("-o", f"remount,{options}", mnt).returncode == 0
            assert has_flag(mnt, os.ST_SYNCHRONOUS) is (options == "rw,sync")


def test_a_missing_flag_about_times_is_cleared(image: Path, tmp_path: Path) -> None:
    """A remount without noatime or nodiratime, or with the opposite, clears the flag."""
    flags = {"noatime": os.ST_NOATIME, "nodiratime": os.ST_NODIRATIME}
    with mounted(image, tmp_path / "mnt", "-o", "noatime") as mnt:
        for options, expected in (
            ("noatime,nodiratime", {"noatime", "nodiratime"}),
            ("noatime,diratime", {"noatime"}),
            ("nodiratime,atime", {"nodiratime"}),
            ("noatime,nodiratime", {"noatime", "nodiratime"}),
            ("rw", set()),
        ):
            assert qedfuse("-o", f"remount,{options}", mnt).returncode == 0
            assert {name for name, flag in flags.items() if has_flag(mnt, flag)} == expected


def test_every_accepted_mount_flag_can_be_mounted(image: Path, tmp_path: Path) -> None:
    """A mount works with all mount flags that qedfuse accepts, as fstab may have them."""
    options = ",".join((*sorted(KERNEL_FLAGS), "relatime", "nodiratime", "nosymfollow"))
    with mounted(image, tmp_path / "mnt", "-o", options) as mnt:
        expected = (os.ST_NOEXEC, os.ST_NOATIME, os.ST_SYNCHRONOUS)
        assert all(has_flag(mnt, flag) for flag in expected)


def has_flag(mountpoint: Path, flag: int) -> bool:
    """Return whether a mount has a flag of statvfs(3)."""
    return bool(os.statvfs(mountpoint).f_flag & flag)


def test_unchanged_options_may_be_repeated(image: Path, tmp_path: Path) -> None:
    """A remount accepts options with their present values, and paths that name the same file."""
    bases = tmp_path / "bases"
    mnt = tmp_path / "mnt"
    for directory in (bases, mnt):
        directory.mkdir()
    program = (make_environment(tmp_path / "environment") / "bin" / "mount.qedfuse", tmp_path)
    program[0].symlink_to("qedfuse")
    options = "overlay=over.qed,backing_dir=bases,frob,cache_size=1M,noexec"
    try:
        code, said = run(*program, image, mnt, "-s", "-o", options)
        assert (code, without_notice(said)) == (0, "")
        for option, line in (
            (f"ro,overlay={tmp_path}/over.qed", ""),
            ("ro,overlay=over.qed,default_permissions,noauto", ""),
            (f"ro,backing_dir={bases},backing=confined,cache_size=1024K,commit=5,noexec", ""),
            (f"rw,{options.replace(',frob', '')}", ""),
            ("ro,backing_dir=mnt", f"backing_dir={mnt}: cannot be changed"),
            (f"ro,overlay={mnt}", f"overlay={mnt}: cannot be changed"),
            ("ro,backing=any", "backing=any: cannot be changed"),
            ("ro,frob", "frob: unknown"),
        ):
            code, error = run(*program, image, mnt, "-o", f"remount,{option}")
            assert code == bool(line), error
            assert line in error
        assert run(*program, image, mnt, "-s", "-o", "remount,ro,frob") == (0, "")
    finally:
        assert qedfuse("umount", mnt).returncode == 0


def run(program: Path, directory: Path, *words: str | Path) -> tuple[int, str]:
    """Run the program in a directory; give its exit code and what it says."""
    done = subprocess.run(
        [program, *words],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    return done.returncode, done.stderr


def test_mount_remounts_with_and_without_fstab(image: Path, installation: Path) -> None:
    """A remount by mount(8), which adds the options of fstab or the mount table, works."""
    shown = run_in_sandbox(
        f"""
        {ROOT}/examples/install.sh --link "$1" >/dev/null 2>&1
        state() {{ grep ' /mnt .* - fuse.qedfuse ' /proc/self/mountinfo | cut -d ' ' -f 6,10; }}
        echo "$2 /mnt fuse.qedfuse rw,growable,allow_root,nosymfollow,nofail 0 0" >/run/fstab
        mount -T /run/fstab /mnt
        state
        mount -T /run/fstab -o remount,ro /mnt
        state
        mount -o remount,rw /mnt
        state
        ! mount -o remount,rw,commit=7 /mnt
        state
        qedfuse umount /mnt
        """,
        installation,
        image,
    )
    plain = "nosuid,nodev,relatime"
    options = "user_id=0,group_id=0,default_permissions,allow_other"
    if extensions.EXPECTED:  # it limits reads
        options += ",max_read=524288"
    lines = shown.split("\n")
    assert lines[0] == f"rw,{plain} rw,{options}"
    assert lines[1].startswith("ro,nosuid,nodev,")
    assert lines[1].endswith(f" ro,{options}")
    assert lines[2].startswith("rw,nosuid,nodev,")
    assert lines[3].startswith("qedfuse: /mnt: option commit=7: cannot be changed by remount")
    assert lines[4] == lines[2]
