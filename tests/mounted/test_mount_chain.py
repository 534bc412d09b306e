"""Mounts of images together with their backing files."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import qemu
from tests.support.mounted import clean_up, front, mounted, qedfuse, refused

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 1 << 20


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Give a directory with a chain of three, a second overlay, and an image without a base."""
    directory = tmp_path / "images"
    directory.mkdir()
    qemu.create(directory / "zz-golden.qed", DISK_BYTES)
    qemu.io(directory / "zz-golden.qed", "write -P 1 0 64k")
    qemu.create(
        directory / "m-middle.qed", DISK_BYTES, backing="zz-golden.qed", backing_format="qed"
    )
    qemu.io(directory / "m-middle.qed", "write -P 2 64k 64k")
    # One sorts before its base, the other after it.
    for name in ("a-top.qed", "n-top.qed"):
        qemu.create(directory / name, DISK_BYTES, backing="m-middle.qed", backing_format="qed")
    qemu.create(directory / "single.qed", DISK_BYTES)
    return directory


def test_bases_are_read_only_beside_their_overlays(images: Path, tmp_path: Path) -> None:
    """Overlays of a mounted directory are writable, their bases read-only, and the log says so."""
    golden, middle = images / "zz-golden.qed", images / "m-middle.qed"
    before = [golden.read_bytes(), middle.read_bytes()]
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    done = qedfuse(images, mnt)
    try:
        assert done.returncode == 0, done.stderr
        tops = f"{images}/a-top.qed, {images}/n-top.qed"
        all_above = f"{images}/a-top.qed, {middle}, {images}/n-top.qed"
        assert sorted(done.stderr.split("\n")[:-1]) == [
            f"qedfuse: {middle}: read-only, because it is a backing file of {tops}",
            f"qedfuse: {golden}: read-only, because it is a backing file of {all_above}",
        ]
        for name in ("a-top", "n-top", "single"):
            with (mnt / f"{name}.raw").open("r+b") as disk:
                disk.seek(DISK_BYTES // 2)
                disk.write(b"new" * 100)
        for name in ("zz-golden", "m-middle"):
            base = mnt / f"{name}.raw"
            assert stat.S_IMODE(base.stat().st_mode) == 0o400
            with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                base.open("r+b")
            with pytest.raises(OSError):  # noqa: PT011  EROFS or EPERM
                os.truncate(base, 2 * DISK_BYTES)
        data = (mnt / "n-top.raw").read_bytes()
        assert data[:131072] == b"\1" * 65536 + b"\2" * 65536
        assert (mnt / "m-middle.raw").read_bytes()[:131072] == data[:131072]
        assert (mnt / "zz-golden.raw").read_bytes()[:131072] == b"\1" * 65536 + bytes(65536)
        assert qedfuse("umount", mnt).returncode == 0
    finally:
        clean_up(mnt)
    assert [golden.read_bytes(), middle.read_bytes()] == before
    assert qemu.check(images / "a-top.qed").code == 0


def test_a_base_below_a_format_of_qemu_is_read_only(images: Path, tmp_path: Path) -> None:
    """A base that QEMU reads for an overlay is found through the image in between."""
    middle = images / "middle.qcow2"
    qemu.create(middle, image_format="qcow2", backing="single.qed", backing_format="qed")
    for name in ("a-top", "m-middle", "n-top", "zz-golden"):
        (images / f"{name}.qed").unlink()
    top = images / "top.qed"
    qemu.create(top, backing="middle.qcow2", backing_format="qcow2")
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    done = qedfuse(images, mnt, "-o", "foreign=qemu")
    try:
        expected = f"{images}/single.qed: read-only, because it is a backing file of {top}"
        assert (done.returncode, done.stderr) == (0, f"qedfuse: {expected}\n")
        with (mnt / "top.raw").open("r+b") as disk:
            disk.write(b"new")
        assert qedfuse("umount", mnt).returncode == 0
    finally:
        clean_up(mnt)


def test_a_named_base_is_refused_beside_its_overlay(images: Path, tmp_path: Path) -> None:
    """A base and its overlay are not mounted for writing together; each alone or read-only is."""
    golden, top = images / "zz-golden.qed", images / "a-top.qed"
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    for words in ((golden, top), (top, golden)):
        line = refused(*words, mnt, code=16)
        assert line == (
            f"{golden}: in use: it is a backing file of {top}, and all would be writable "
            "(name only the overlays, or mount all read-only with -r)"
        )
    for allowed in ((golden, top, mnt, "-r"), (images, mnt, "-r"), (top, mnt), (golden, mnt)):
        done = qedfuse(*allowed)
        assert (done.returncode, done.stderr) == (0, "")
        assert qedfuse("umount", mnt).returncode == 0


def test_one_image_by_two_names_is_refused(images: Path, tmp_path: Path) -> None:
    """Two names of one image are refused with a line that names both, unless read-only."""
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    (images / "other.qed").symlink_to("single.qed")
    line = refused(images, mnt, code=16)
    assert line == (
        f"{images}/single.qed: in use: found the same file as {images}/other.qed "
        "(name the file once, or mount all read-only with -r)"
    )
    with mounted(images, mnt, "-r") as directory:
        assert len(list(directory.iterdir())) == 6


def test_snapshot_makes_each_disk_of_a_directory_writable(images: Path, tmp_path: Path) -> None:
    """With -o snapshot each disk of a directory is writable, bases included."""
    with mounted(images, tmp_path / "mnt", "-o", "snapshot") as directory:
        for disk in directory.iterdir():
            with disk.open("r+b") as file:
                file.write(b"gone")


def test_a_base_is_recognized_by_inode(images: Path, tmp_path: Path) -> None:
    """A base is recognized through a symbolic link and through an image that is not mounted."""
    away = tmp_path / "away"
    away.mkdir()
    (images / "m-middle.qed").rename(away / "m-middle.qed")
    (away / "link.qed").symlink_to(images / "zz-golden.qed")
    words = ["-f", "qed", "-u", "-F", "qed"]
    qemu.run("qemu-img", "rebase", *words, "-b", "link.qed", away / "m-middle.qed")
    for name in ("a-top.qed", "n-top.qed"):
        qemu.run("qemu-img", "rebase", *words, "-b", "../away/m-middle.qed", images / name)
    option = f"backing_dir={away},backing_dir={images}"
    with front("-o", option, images, tmp_path / "mnt") as mount:
        assert "zz-golden.qed: read-only" in mount.read_line()
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.finish()[0] == 0
