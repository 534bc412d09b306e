"""``qedimg compare`` compared with qemu-img, and its messages for mistakes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from tests.support import qemu
from tests.support.chains import content, draw_chain, draw_image, draw_raw, kind
from tests.support.disks import build_image, l2_entry_offset, put_entry
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


def by_qemu(*words: object) -> tuple[int, str]:
    """Let QEMU compare two disks; give its exit code and output."""
    done = subprocess.run(
        ["qemu-img", "compare", *map(str, words)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def by_qedimg(capsys: Captured, *words: object) -> tuple[int, str]:
    """Compare two disks; give the exit code and the output."""
    code = main(["compare", *map(str, words)])
    return code, capsys.readouterr().out


def first_difference(one: bytes, other: bytes) -> int | None:
    """Return the offset of the first byte that differs; a shorter disk continues with zeros."""
    size = max(len(one), len(other))
    one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
    return next((at for at in range(size) if one[at] != other[at]), None) if one != other else None


@pytest.mark.parametrize("seed", range(share(10, of=30)))
def test_output_agrees_with_qemu(seed: int, tmp_path: Path, capsys: Captured) -> None:
    """Output and exit code are QEMU's, except that the offset is the byte's, not the sector's."""
    chance = random.Random(seed)
    one = draw_chain(tmp_path, chance, "one", chance.randrange(1, 4))
    bytes_of_one = content(one)
    if chance.random() < 0.7:
        # The same content in another layout, perhaps changed in one byte or made longer.
        other = tmp_path / "other.raw"
        changed = bytearray(bytes_of_one)
        if chance.random() < 0.6:
            changed[chance.randrange(len(changed))] ^= 1 + chance.randrange(255)
        changed += bytes(chance.choice((0, 0, 512, 70_000 // 512 * 512)))
        if chance.random() < 0.2:
            changed[-1] = 1
        other.write_bytes(changed)
        if chance.random() < 0.5:
            image = tmp_path / "other.qed"
            subprocess.run(["qemu-img", "convert", "-O", "qed", other, image], check=True)
            other = image
    else:
        draw, suffix = chance.choice(((draw_image, "qed"), (draw_raw, "raw")))
        other = draw(tmp_path / f"other.{suffix}", chance)
    formats = ["-f", kind(one), "-F", kind(other)]
    found = by_qedimg(capsys, *formats, one, other)
    expected = by_qemu(*formats, one, other)
    assert found[0] == expected[0]
    where = first_difference(bytes_of_one, content(other))
    assert re.sub(r"\d+", "N", found[1]) == re.sub(r"\d+", "N", expected[1])
    if where is None:
        assert found[0] == 0
    else:
        assert f"Content mismatch at offset {where}!" in found[1]
        assert f"Content mismatch at offset {where - where % 512}!" in expected[1]
    main(["compare", "--output", "json", *formats, str(one), str(other)])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["identical"], answer["offset"]) == (where is None, where)
    assert by_qedimg(capsys, "-q", *formats, one, other) == (found[0], "")


def test_strict(tmp_path: Path, capsys: Captured) -> None:
    """With -s the size counts, and whether a range is data or a hole."""
    one, other = tmp_path / "one.qed", tmp_path / "other.qed"
    one.write_bytes(build_image(1 << 20, {3: bytes(4096), 5: b"x"}))
    other.write_bytes(build_image(1 << 20, {5: b"x"}))
    assert by_qedimg(capsys, one, other) == (0, "Images are identical.\n")
    assert by_qedimg(capsys, "-s", one, one)[0] == 0
    assert by_qedimg(capsys, "-s", one, other) == (
        1,
        "Strict mode: Offset 12288 block status mismatch!\n",
    )
    other.write_bytes(build_image(1 << 20, {3: b"y", 5: b"x"}))
    assert by_qedimg(capsys, "-s", one, other) == (1, "Content mismatch at offset 12288!\n")
    other.write_bytes(build_image(2 << 20, {3: bytes(4096), 5: b"x"}))
    assert by_qedimg(capsys, "-s", one, other) == (1, "Strict mode: Image size mismatch!\n")
    assert by_qedimg(capsys, one, other) == (
        0,
        "Warning: Image size mismatch!\nImages are identical.\n",
    )


def test_an_empty_overlay_equals_its_base(tmp_path: Path, capsys: Captured) -> None:
    """An overlay without clusters equals its base, also with -s."""
    base, top = tmp_path / "base.qed", tmp_path / "top.qed"
    base.write_bytes(build_image(1 << 20, {1: b"a", 5: 1, 9: b"q"}))
    top.write_bytes(build_image(1 << 20, {}, backing=b"base.qed"))
    assert by_qedimg(capsys, "-s", base, top) == (0, "Images are identical.\n")
    top.write_bytes(build_image(1 << 20, {3: bytes(4096)}, backing=b"base.qed"))
    code, said = by_qedimg(capsys, "-s", base, top)
    assert (code, said) == (1, "Strict mode: Offset 12288 block status mismatch!\n")


def test_the_first_difference_is_reported(tmp_path: Path, capsys: Captured) -> None:
    """With -s the first difference is reported, whether of content or of allocation."""
    one, other = tmp_path / "one.qed", tmp_path / "other.qed"
    one.write_bytes(build_image(1 << 20, {1: b"a", 9: b"q"}))
    other.write_bytes(build_image(1 << 20, {1: b"b", 2: bytes(9), 9: b"r"}))
    assert by_qedimg(capsys, "-s", one, other) == (1, "Content mismatch at offset 4096!\n")
    other.write_bytes(build_image(1 << 20, {1: b"a", 2: bytes(9), 9: b"r"}))
    code, said = by_qedimg(capsys, "-s", one, other)
    assert (code, said) == (1, "Strict mode: Offset 8192 block status mismatch!\n")


@pytest.mark.expect_log("largest.qed: QEMU cannot open an image with clusters of 67108864")
def test_large_holes_cost_nothing(tmp_path: Path, capsys: Captured) -> None:
    """Disks of 64 TiB with little data are compared by their data alone."""
    paths = [tmp_path / "one.qed", tmp_path / "other.qed"]
    for number, path in enumerate(paths):
        qemu.create(path, 64 << 40, cluster_size=1 << 20)
        qemu.io(path, f"write -P {5 + number} {(64 << 40) - 4096} 4096")
    assert by_qedimg(capsys, paths[0], paths[0])[0] == 0
    assert by_qedimg(capsys, *paths) == (1, f"Content mismatch at offset {(64 << 40) - 4096}!\n")
    largest = str(tmp_path / "largest.qed")
    wide = ["--cluster-size", "64M", "--table-size", "16"]
    assert main(["create", "-q", *wide, largest, str((1 << 63) - 512)]) == 0
    assert by_qedimg(capsys, largest, largest) == (0, "Images are identical.\n")


def test_mistakes(tmp_path: Path, capsys: Captured) -> None:
    """Each mistake is one line with QEMU's exit code."""
    good, bad = tmp_path / "good.qed", tmp_path / "bad.qed"
    content_of_good = build_image(1 << 20, {0: b"a", 1: b"b"})
    good.write_bytes(content_of_good)
    broken = bytearray(content_of_good)
    put_entry(broken, l2_entry_offset(broken, 1), 7)
    bad.write_bytes(broken)
    cut = tmp_path / "cut.qed"
    cut.write_bytes(b"QED\0short")
    for words, code, text in (
        ((good, tmp_path / "none"), 2, "none: cannot open"),
        ((good, cut), 2, "cut.qed"),
        ((good, tmp_path), 2, "found a directory"),
        ((good,), 2, "SECOND"),
        ((good, bad), 4, "L2 entry 1"),
    ):
        assert main(["compare", *map(str, words)]) == code
        said = capsys.readouterr()
        assert text in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert os.stat(good).st_size == len(content_of_good)  # noqa: PTH116
