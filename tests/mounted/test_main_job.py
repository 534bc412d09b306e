"""The main job end to end: the kernel, losetup, sfdisk, ext4 and QEMU read and write a mount."""

from __future__ import annotations

import filecmp
import random
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.disks import has_need_check
from tests.support.mounted import mounted

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 256 << 20
"""Size of the disks that are compared byte for byte: their holes are most of the work."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Give a directory tree of files of many sizes."""
    chance = random.Random(1)
    root = tmp_path / "tree"
    for number in range(60):
        path = root / f"{number % 7}" / f"{number % 3}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([0, 1, 511, 4096, 70_000, 900_000])))
    return root


def partitioned_ext4(path: Path, tree: Path, size: int) -> None:
    """Make a raw disk with a partition table and an ext4 file system holding a tree."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "--quiet", str(path)], input=b"start=2048, type=83\n", check=True)
    with loop_device(path, "--partscan") as device:
        run("mkfs.ext4", "-q", "-d", tree, f"{device}p1")


def same_tree(one: Path, other: Path) -> bool:
    """Return whether two trees hold the same files with the same bytes."""
    compared = filecmp.dircmp(one, other, ignore=["lost+found"])
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    _same, different, failed = filecmp.cmpfiles(one, other, compared.common_files, shallow=False)
    return not (different or failed) and all(
        same_tree(one / name, other / name) for name in compared.common_dirs
    )


@pytest.fixture
def raw(tmp_path: Path, tree: Path) -> Path:
    """Give a raw disk with a partition and an ext4 file system."""
    path = tmp_path / "disk.raw"
    partitioned_ext4(path, tree, DISK_BYTES)
    return path


def change_through_loop(disk: Path, tree: Path, tmp_path: Path) -> None:
    """Copy a tree onto the ext4 partition of a mounted disk, and delete a directory of another."""
    with (
        loop_device(disk, "--partscan") as device,
        file_system(f"{device}p1", tmp_path / "ext4") as root,
    ):
        assert same_tree(tree, root)
        shutil.copytree(tree, root / "copy")
        shutil.rmtree(root / "3")


def check_changed(raw_copy: Path, tree: Path, tmp_path: Path) -> None:
    """Check the file system and its content in a raw copy of the disk."""
    with loop_device(raw_copy, "--partscan") as device:
        run("fsck.ext4", "-f", "-n", f"{device}p1")
        with file_system(f"{device}p1", tmp_path / "ext4") as root:
            assert same_tree(tree, root / "copy")
            assert not (root / "3").exists()


def test_a_qemu_image_is_read_exactly_and_changed(raw: Path, tree: Path, tmp_path: Path) -> None:
    """A mount shows QEMU's image exactly, and QEMU finds the changed image clean and equal."""
    image = tmp_path / "disk.qed"
    run("qemu-img", "convert", "-O", "qed", raw, image)
    with mounted(image, tmp_path / "mnt") as directory:
        disk = directory / "disk.raw"
        run("cmp", raw, disk)
        change_through_loop(disk, tree, tmp_path)
        ours = tmp_path / "ours.raw"
        run("cp", "--sparse=always", disk, ours)
    assert not has_need_check(image)
    assert "No errors" in run("qemu-img", "check", image)
    theirs = tmp_path / "theirs.raw"
    run("qemu-img", "convert", "-O", "raw", image, theirs)
    run("cmp", ours, theirs)
    check_changed(theirs, tree, tmp_path)


def test_a_chain_of_qed_over_qed_over_raw_is_read_and_changed(
    raw: Path, tree: Path, tmp_path: Path
) -> None:
    """A chain of QED over QED over raw reads as its layers; writes change only the top image."""
    middle, top = tmp_path / "middle.qed", tmp_path / "top.qed"
    run("qemu-img", "create", "-q", "-f", "qed", "-b", raw.name, "-F", "raw", middle)
    run("qemu-io", "-f", "qed", "-c", "write -P 7 225M 200k", "-c", "write -z 237M 1M", middle)
    run("qemu-img", "create", "-q", "-f", "qed", "-b", middle.name, "-F", "qed", top)
    expected = tmp_path / "expected.raw"
    run("qemu-img", "convert", "-O", "raw", top, expected)
    before = {path: path.stat().st_mtime_ns for path in (raw, middle)}
    with mounted(top, tmp_path / "mnt") as directory:
        disk = directory / "top.raw"
        run("cmp", expected, disk)
        change_through_loop(disk, tree, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in (raw, middle)}
    assert "No errors" in run("qemu-img", "check", top)
    result = tmp_path / "result.raw"
    run("qemu-img", "convert", "-O", "raw", top, result)
    with mounted(top, tmp_path / "mnt", "-o", "ro") as directory:
        run("cmp", result, directory / "top.raw")
    check_changed(result, tree, tmp_path)


def test_a_new_disk_is_partitioned_formatted_and_used(tmp_path: Path, tree: Path) -> None:
    """sfdisk, mkfs, a copy, fsck and a second mount work as on any raw disk."""
    image = tmp_path / "new.qed"
    qemu.create(image, 1 << 30)
    with mounted(image, tmp_path / "mnt") as directory:
        disk = directory / "new.raw"
        subprocess.run(["sfdisk", "-q", str(disk)], input=b"size=200M\n,\n", check=True)
        assert "new.raw2" in run("fdisk", "-l", disk)
        with loop_device(disk, "--partscan") as device:
            run("mkfs.ext4", "-q", f"{device}p2")
            with file_system(f"{device}p2", tmp_path / "ext4") as root:
                shutil.copytree(tree, root / "tree")
            run("fsck.ext4", "-f", "-n", f"{device}p2")
    assert "No errors" in run("qemu-img", "check", image)
    with mounted(image, tmp_path / "mnt") as directory:  # noqa: SIM117  one needs the other
        with loop_device(directory / "new.raw", "--partscan", "--read-only") as device:
            with file_system(f"{device}p2", tmp_path / "ext4") as root:
                assert same_tree(tree, root / "tree")


def test_direct_io_loop_device_writes_through(tmp_path: Path) -> None:
    """A loop device with direct I/O reads back what it wrote, and so does QEMU."""
    image = tmp_path / "direct.qed"
    qemu.create(image, 64 << 20)
    pattern = bytes(range(256)) * 4096
    source = tmp_path / "pattern"
    source.write_bytes(pattern)
    with (
        mounted(image, tmp_path / "mnt") as directory,
        loop_device(directory / "direct.raw", "--direct-io=on") as device,
    ):
        run("dd", f"if={source}", f"of={device}", "bs=64k", "seek=3", "oflag=direct", "conv=fsync")
        run("dd", f"if={device}", f"of={tmp_path / 'back'}", "bs=64k", "skip=3", "count=16")
        assert (tmp_path / "back").read_bytes() == pattern
    run("qemu-img", "convert", "-O", "raw", image, tmp_path / "flat")
    with (tmp_path / "flat").open("rb") as flat:
        flat.seek(3 * 65536)
        assert flat.read(len(pattern)) == pattern
