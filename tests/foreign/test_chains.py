"""Chains of images that mix formats read as QEMU reads them."""

from __future__ import annotations

import filecmp
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

import qedfuse
from tests.support import qemu
from tests.support.foreignchains import (
    DISK_BYTES,
    FORMATS,
    contents,
    draw_bottom,
    draw_chain,
    draw_disk,
    processes,
)
from tests.support.mounted import mounted
from tests.support.programs import qedimg

if TYPE_CHECKING:
    from pathlib import Path

ALLOWED = ("--foreign", "qemu")


def run(*words: str | Path) -> str:
    """Run a command of qedimg that must succeed without a message; return its output."""
    code, output, complaint = qedimg(*words)
    assert (code, complaint) == (0, "")
    return output


def assert_same_disk(path: Path, expected: Path, *options: str) -> None:
    """Assert that the commands find the content of a raw file in an image."""
    copy = expected.with_name("copy.raw")
    run("convert", *options, "-O", "raw", path, copy)
    assert filecmp.cmp(copy, expected, shallow=False)
    run("compare", *options, path, expected)
    content = expected.read_bytes()
    end = 0
    for extent in json.loads(run("map", *options, "--output", "json", path)):
        assert extent["start"] == end
        end += extent["length"]
        if extent["zero"]:
            assert not any(content[extent["start"] : end])
    assert end == len(content)


@pytest.mark.parametrize("image_format", FORMATS)
def test_each_format(tmp_path: Path, image_format: str) -> None:
    """An image that the user names is read in each format, without an option."""
    path, expected = draw_disk(tmp_path, image_format)
    assert any(expected.read_bytes())
    assert_same_disk(path, expected)
    with qedfuse.open(path) as disk:
        assert disk.read() == expected.read_bytes()
    info = json.loads(run("info", "--output", "json", path))
    assert (info["format"], info["virtual-size"]) == (image_format, expected.stat().st_size)
    assert processes(tmp_path) == []


@pytest.mark.parametrize("seed", range(8))
def test_random_chain(tmp_path: Path, seed: int) -> None:
    """An overlay over a chain of several formats reads as in QEMU, by commands and a mount."""
    chance = random.Random(seed)
    path, expected = draw_chain(tmp_path, chance, "qed")
    assert_same_disk(path, expected, *ALLOWED)
    with mounted(path, tmp_path / "mnt", "-o", "ro,foreign=qemu"):
        found = (tmp_path / "mnt" / f"{path.stem}.raw").read_bytes()
    assert found == expected.read_bytes()
    assert processes(tmp_path) == []


@pytest.mark.parametrize("seed", range(8, 14))
def test_random_source(tmp_path: Path, seed: int) -> None:
    """A source in another format, over several images, needs no option, and takes writes above."""
    chance = random.Random(seed)
    path, expected = draw_chain(tmp_path, chance, chance.choice(("qcow2", "qcow")))
    assert_same_disk(path, expected)
    before = path.read_bytes()
    overlay = tmp_path / "overlay.qed"
    with mounted(path, tmp_path / "mnt", "-o", f"overlay={overlay}"):
        disk = tmp_path / "mnt" / f"{path.name}.raw"
        assert disk.read_bytes() == expected.read_bytes()
        with disk.open("r+b") as file:
            file.seek(70_000)
            file.write(b"x" * 1000)
    with expected.open("r+b") as file:
        file.seek(70_000)
        file.write(b"x" * 1000)
    assert path.read_bytes() == before
    assert filecmp.cmp(contents(overlay, tmp_path / "mnt"), expected, shallow=False)
    with mounted(path, tmp_path / "mnt2", "-o", f"overlay={overlay}"):
        assert (tmp_path / "mnt2" / disk.name).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("options", ["compression_type=zlib", "compression_type=zstd"])
def test_compressed(tmp_path: Path, options: str) -> None:
    """Compressed clusters are read."""
    raw = tmp_path / "expected.raw"
    raw.write_bytes(bytes(range(256)) * (DISK_BYTES // 256))
    path = tmp_path / "image.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    assert path.stat().st_size < DISK_BYTES // 4
    assert_same_disk(path, raw)


def test_rebase(tmp_path: Path) -> None:
    """A rebase to a base in another format keeps the disk, which QEMU then reads too."""
    chance = random.Random(1)
    old = draw_bottom(tmp_path / "old.qed", "qed", chance)
    new = draw_bottom(tmp_path / "new.qcow2", "qcow2", chance)
    path = tmp_path / "image.qed"
    qemu.create(path, backing=old)
    expected = contents(path, tmp_path)
    output = run("rebase", "-b", new, path)
    assert "has the base" in output
    assert_same_disk(path, expected, *ALLOWED)
    assert qemu.compare(path, expected)


@pytest.fixture
def full_image(tmp_path: Path) -> Path:
    """Make a qcow2 image that has data in all clusters, so its file has data everywhere too."""
    raw, path = tmp_path / "full.raw", tmp_path / "full.qcow2"
    raw.write_bytes(random.Random(1).randbytes(DISK_BYTES))
    qemu.run("qemu-img", "convert", "-O", "qcow2", raw, path)
    return path


@pytest.mark.parametrize(("old", "new"), [("raw", "qcow2"), ("qcow2", "raw")])
def test_rebase_to_another_reading(tmp_path: Path, full_image: Path, old: str, new: str) -> None:
    """A rebase to the same file in another format keeps the disk."""
    path = tmp_path / "image.qed"
    run("create", "-f", "qed", "-b", full_image, "-F", old, path)
    expected = contents(path, tmp_path)
    run("rebase", *ALLOWED, "-b", full_image, "-F", new, path)
    # The expected bytes begin with those of a qcow2 image if the old base was raw.
    run("compare", *ALLOWED, "-F", "raw", path, expected)
    assert qemu.compare(path, expected)


@pytest.fixture
def linked_images(tmp_path: Path) -> tuple[Path, Path]:
    """Make one qcow2 file with two names, whose relative backing file differs by directory."""
    for number, name in enumerate("ab", 1):
        (tmp_path / name).mkdir()
        raw = tmp_path / name / "base"
        raw.write_bytes(bytes([number]) * DISK_BYTES)
        qemu.run("qemu-img", "convert", "-O", "qcow2", raw, raw.with_suffix(".qcow2"))
    first, second = (tmp_path / name / "x.qcow2" for name in "ab")
    qemu.create(first, image_format="qcow2", backing="base.qcow2", backing_format="qcow2")
    second.hardlink_to(first)
    return first, second


def test_rebase_to_another_name_of_the_base(
    tmp_path: Path, linked_images: tuple[Path, Path]
) -> None:
    """A rebase to a base that is the same file, but has other bases by its other name, copies."""
    first, second = linked_images
    path = tmp_path / "image.qed"
    run("create", "-f", "qed", "-b", first, path)
    expected = contents(path, tmp_path)
    run("rebase", *ALLOWED, "-b", second, path)
    run("compare", *ALLOWED, "-F", "raw", path, expected)
    assert qedimg("compare", *ALLOWED, first, second)[0] == 1


def test_compare_two_readings(full_image: Path) -> None:
    """An image and its own file as a raw disk differ."""
    code, output, _ = qedimg("compare", "-f", "raw", full_image, full_image)
    assert code == 1
    assert "offset 0" in output


@pytest.mark.parametrize("image_format", FORMATS)
def test_create_over(tmp_path: Path, image_format: str) -> None:
    """A new image over a base in each format has the size and the bytes that QEMU gives it."""
    base, expected = draw_disk(tmp_path, image_format)
    path, stated, other = (tmp_path / name for name in ("new.qed", "stated.qed", "qemu.qed"))
    output = run("create", "-b", base, path)
    assert f"over {base} ({image_format})" in output
    run("create", "-b", base.name, "-F", image_format, stated)
    qemu.create(other, backing=base, backing_format=image_format)
    assert (
        json.loads(run("info", "--output", "json", path))["virtual-size"]
        == (qemu.info(other)["virtual-size"])
    )
    for overlay in (path, stated):
        run("compare", *ALLOWED, overlay, expected)
        assert qemu.compare(overlay, expected)
    assert_same_disk(path, expected, *ALLOWED)
    code, _, complaint = qedimg("compare", path, expected)
    assert (code, "foreign=qemu" in complaint) == (2, True)
    assert processes(tmp_path) == []


@pytest.mark.parametrize("image_format", FORMATS)
def test_convert_over(tmp_path: Path, image_format: str) -> None:
    """A copy over a base in another format has only the difference, and reads as its source."""
    base, source = draw_disk(tmp_path, image_format)
    with source.open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"x" * 1000)
    path = tmp_path / "copy.qed"
    run("convert", "--compare", "-B", base, "-F", image_format, source, path)
    assert_same_disk(path, source, *ALLOWED)
    assert qemu.compare(path, source)
    empty = qemu.create(tmp_path / "empty.qed", DISK_BYTES)
    assert path.stat().st_size <= empty.stat().st_size + (2 << 20)
    words = ("measure", "-B", base, "-F", image_format, "--output", "json", source)
    assert json.loads(run(*words))["required"] == path.stat().st_size
    assert processes(tmp_path) == []


def test_create_over_chain_outside(tmp_path: Path) -> None:
    """The base of a new image may lie anywhere, but its own bases only where the user allows."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    below = draw_bottom(tmp_path / "a" / "below.qcow2", "qcow2", random.Random(1))
    base = qemu.create(
        tmp_path / "b" / "base.qcow2", image_format="qcow2", backing=below, backing_format="qcow2"
    )
    path = tmp_path / "new.qed"
    code, _, complaint = qedimg("create", "-b", base, path)
    assert (code, "backing_dir=" in complaint) == (17, True)
    assert not path.exists()
    run("create", "-b", base, "--backing-dir", below.parent, path)
    assert qemu.info(path)["virtual-size"] == DISK_BYTES


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vpc", "qcow"])
def test_map(tmp_path: Path, image_format: str) -> None:
    """The map of an image has the ranges of data and of zeros that QEMU finds."""
    path = draw_bottom(tmp_path / f"image.{image_format}", image_format, random.Random(4))
    found = json.loads(run("map", "--output", "json", path))
    expected = qemu.map_extents(path, image_format=image_format)
    assert zero_ranges(found) == zero_ranges(expected)
    assert zero_ranges(found)


def zero_ranges(extents: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the beginning and the end of each range of zeros."""
    found: list[tuple[int, int]] = []
    for extent in extents:
        begin, end = extent["start"], extent["start"] + extent["length"]
        if not extent["zero"]:
            continue
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def test_no_file_offsets(tmp_path: Path) -> None:
    """A map has no file offset for data whose place only QEMU knows."""
    base = draw_bottom(tmp_path / "base.qcow2", "qcow2", random.Random(1))
    extents = json.loads(run("map", "--output", "json", base))
    assert any(extent["data"] for extent in extents)
    assert not any("offset" in extent for extent in extents)
    lines = run("map", base).splitlines()
    assert {line.split()[2] for line in lines[1:]} == {"-"}
