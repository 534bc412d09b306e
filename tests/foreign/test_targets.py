"""A file from which an image in a format of QEMU is read never becomes its overlay or a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.lookup.backingpath import MAX_CHAIN_DEPTH, chain_paths
from qedfuse.foreign.links import MAX_EXTENTS
from tests.support import qemu
from tests.support.programs import qedimg

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 4 << 20

VICTIMS: Final = {
    "base.raw": "vm.qcow2",
    "base.qed": "over-qed.qcow2",
    "inner.raw": "outer.qcow2",
    "data.raw": "split.qcow2",
    "flat-f001.vmdk": "flat.vmdk",
    "parent.vmdk": "child.vmdk",
}
"""Files that qedimg must not overwrite, each with an image that is read from the file."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a directory with images that are read from several files, and an unrelated disk."""
    for name in ("base.raw", "inner.raw"):
        qemu.create(tmp_path / name, DISK_BYTES, image_format="raw")
        qemu.io(tmp_path / name, "write -P 7 0 1M", image_format="raw")
    qemu.create(tmp_path / "base.qed", DISK_BYTES)
    (tmp_path / "other.raw").write_bytes(b"x" * DISK_BYTES)
    for name, base, base_format in (
        ("vm.qcow2", "base.raw", "raw"),
        ("over-qed.qcow2", "base.qed", "qed"),
        ("inner.qcow2", "inner.raw", "raw"),
        ("outer.qcow2", "inner.qcow2", "qcow2"),
    ):
        path = tmp_path / name
        qemu.create(path, image_format="qcow2", backing=base, backing_format=base_format)
    split = ("-o", f"data_file={tmp_path}/data.raw", tmp_path / "split.qcow2", str(DISK_BYTES))
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", *split)
    flat = ("-o", "subformat=twoGbMaxExtentFlat", tmp_path / "flat.vmdk", str(DISK_BYTES))
    qemu.run("qemu-img", "create", "-q", "-f", "vmdk", *flat)
    qemu.create(tmp_path / "parent.vmdk", DISK_BYTES, image_format="vmdk")
    qemu.create(
        tmp_path / "child.vmdk", image_format="vmdk", backing="parent.vmdk", backing_format="vmdk"
    )
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(images: Path, words: str, code: int) -> str:
    """Assert that a command fails and changes no file; return its message."""
    before = contents(images)
    found, _, complaint = qedimg(*words.split(), cwd=images)
    assert (found, complaint.count("\n")) == (code, 1), complaint
    assert contents(images) == before
    return complaint


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_copy_over_a_file_of_its_source(images: Path, victim: str) -> None:
    """A file from which the source of a copy is read is refused as the target, also with -n.

    Locks do not suffice: with -U nothing is locked, and QEMU permits writes to a raw base.
    """
    source = VICTIMS[victim]
    assert qedimg("create", "-b", source, "top.qed", cwd=images)[0] == 0
    for words in (
        f"--force {source} {victim}",
        f"-U -n -O raw {source} {victim}",
        f"--foreign qemu --force top.qed {victim}",
        f"--force -O qcow2 {source} {victim}",
    ):
        complaint = refused(images, f"convert {words}", 1)
        assert f"{victim}: target: found a file from which the source is read" in complaint


@pytest.mark.parametrize("victim", VICTIMS)
def test_an_overlay_over_itself(images: Path, victim: str) -> None:
    """No command makes a file the overlay of an image that is read from this file."""
    base = VICTIMS[victim]
    driver = base.rpartition(".")[2]
    assert qedimg("create", "-b", base, "top.qed", cwd=images)[0] == 0
    for words in (
        f"create --force -b {base} {victim}",
        f"create --force -b {base} -F {driver} {victim}",
        f"create --force -b top.qed {victim}",
        f"convert --force -B {base} other.raw {victim}",
        f"convert --force --foreign qemu -B top.qed other.raw {victim}",
    ):
        through = "top.qed" if "top.qed" in words else base
        complaint = refused(images, words, 17)
        assert f"{victim}: found the image itself through {through}" in complaint


@pytest.mark.parametrize("words", ["-u", ""])
def test_a_rebase_onto_its_own_overlay(images: Path, words: str) -> None:
    """A rebase refuses a base in a format of QEMU that is read from the image, even as raw."""
    qemu.create(images / "new.qed", DISK_BYTES)
    (images / "new.qed").rename(images / "base.raw")
    complaint = refused(images, f"rebase {words} -b vm.qcow2 -F qcow2 base.raw", 17)
    expected = "found the image itself through vm.qcow2"
    if words != "-u":
        expected = "backing file vm.qcow2: found a loop in the chain through base.raw"
    assert expected in complaint


def test_other_files_may_be_replaced(images: Path) -> None:
    """A file from which the chain is not read is replaced."""
    for words in (
        "convert --force vm.qcow2 other.raw",
        "create --force -b outer.qcow2 vm.qcow2",
        "convert --force -B split.qcow2 inner.raw other.raw",
    ):
        assert qedimg(*words.split(), cwd=images)[::2] == (0, "")


def test_paths_of_a_hostile_chain(images: Path) -> None:
    """The number of paths is limited, whatever names an image and its bases have."""
    path = images / "many.vmdk"
    names = "".join(f'RW 8 FLAT "{number}" 0\n' for number in range(MAX_EXTENTS + 100))
    path.write_text(f"# Disk DescriptorFile\n{names}", "utf-8")
    assert len(list(chain_paths(str(path)))) == MAX_EXTENTS
    loop = qemu.create(images / "a.qcow2", DISK_BYTES, image_format="qcow2")
    qemu.run("qemu-img", "rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", loop)
    assert list(chain_paths(str(loop))) == [str(loop)] * (MAX_CHAIN_DEPTH + 1)
