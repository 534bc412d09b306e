"""``qedimg dump``: the header and each table entry, valid or not."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.ondisk.constants import ZERO
from qedfuse.ondisk.header import Header, build_header
from tests.support import qemu
from tests.support.chains import draw_any_size, draw_image
from tests.support.disks import build_image, get_entry, put_entry
from tests.toolbox import memory

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER_BYTES = 4096
MIB = 1 << 20


def dump(
    *arguments: str | Path, capsys: pytest.CaptureFixture[str], code: int = 0
) -> tuple[Any, str]:
    """Run the command with JSON; give its output and its error message."""
    assert main(["dump", "--output", "json", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert bool(said.err) == bool(code), said.err
    return json.loads(said.out) if not code else None, said.err


def ranges(value: dict[str, Any]) -> list[tuple[int, int, int, str]]:
    """Give the entries: index, count, value and verdict."""
    return [
        (item["index"], item["count"], item["value"], item["verdict"]) for item in value["entries"]
    ]


def expanded(value: dict[str, Any]) -> dict[int, int]:
    """Return each entry that the ranges stand for."""
    return {
        item["index"] + number: item["value"] + number * item["step"]
        for item in value["entries"]
        for number in range(item["count"])
    }


@pytest.mark.parametrize("seed", range(12))
def test_every_entry(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The entries of an image that QEMU wrote are listed exactly, each with a good verdict."""
    path = tmp_path / "disk.qed"
    draw_image(path, random.Random(seed), size_of=draw_any_size)
    content = path.read_bytes()
    fields = {
        item["name"]: item["value"] for item in dump("header", path, capsys=capsys)[0]["fields"]
    }
    count = fields["cluster_size"] * fields["table_size"] // 8
    l1, _err = dump("l1", path, capsys=capsys)
    tables = stored(content, fields["l1_table_offset"], count)
    assert expanded(l1) == tables
    for number, table in tables.items():
        l2, _err = dump("l2", str(number), path, capsys=capsys)
        assert expanded(l2) == stored(content, table, count)
        assert (l2["l1-index"], l2["table-offset"]) == (number, table)
        verdicts = {item["verdict"] for item in l2["entries"]}
        assert verdicts <= {"ok", "zeros"}
        for item in l2["entries"]:
            start = number * count * fields["cluster_size"] + item["index"] * fields["cluster_size"]
            assert item["guest-start"] == start
            assert item["guest-length"] == item["count"] * fields["cluster_size"]


def stored(content: bytes, table: int, count: int) -> dict[int, int]:
    """Read a table; return the entries in use by their indexes."""
    values = np.frombuffer(content, "<u8", count, table)
    return {at: int(values[at]) for at in np.flatnonzero(values).tolist()}


def test_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each header field is listed with its offset, value and meaning."""
    path = tmp_path / "disk.qed"
    path.write_bytes(build_image(MIB, backing=b"base", compat=32))
    value, _err = dump("header", path, capsys=capsys)
    assert value["problems"] == []
    fields = {item["name"]: item for item in value["fields"]}
    assert len(fields) == 11
    assert fields["features"]["meaning"] == "backing_file"
    assert fields["compat_features"]["meaning"] == "unknown bit 5"
    assert (fields["image_size"]["offset"], fields["image_size"]["value"]) == (48, MIB)
    assert main(["dump", "header", str(path)]) == 0
    assert "16  features                 0x0000000000000001" in capsys.readouterr().out


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each entry has its verdict, and consecutive entries of a kind are one range."""
    good = dict.fromkeys((0, 1, 2, 9), b"x")
    odd = {
        4: ZERO,
        5: ZERO,
        6: 4096 * 3 + 5,
        7: 1 << 50,
        8: CLUSTER_BYTES,
        11: (1 << 50) + CLUSTER_BYTES,
    }
    image = build_image(4 * MIB, {**good, **odd}, header_size=2)
    table = get_entry(image, 2 * CLUSTER_BYTES)
    length = len(image)
    put_entry(image, 2 * CLUSTER_BYTES + 8, 4097)
    put_entry(image, 2 * CLUSTER_BYTES + 16, 1 << 62)
    put_entry(image, 2 * CLUSTER_BYTES + 24, 2 * CLUSTER_BYTES)
    path = tmp_path / "disk.qed"
    path.write_bytes(image + bytes(100))
    put_entry(image, table + 8 * 12, length)
    path.write_bytes(image + bytes(100))
    assert ranges(dump("l1", path, capsys=capsys)[0]) == [
        (0, 1, table, "ok"),
        (1, 1, 4097, "reserved"),
        (2, 1, 1 << 62, "past the end"),
        (3, 1, 2 * CLUSTER_BYTES, "over metadata"),
    ]
    first = table + CLUSTER_BYTES
    assert ranges(dump("l2", "0", path, capsys=capsys)[0]) == [
        (0, 3, first, "ok"),
        (4, 2, ZERO, "zeros"),
        (6, 1, 4096 * 3 + 5, "reserved"),
        (7, 1, 1 << 50, "past the end"),
        (8, 1, CLUSTER_BYTES, "over metadata"),
        (9, 1, first + 3 * CLUSTER_BYTES, "ok"),
        (11, 1, (1 << 50) + CLUSTER_BYTES, "past the end"),
        (12, 1, length, "cut short"),
    ]
    assert main(["dump", "l2", "0", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["4", "2", "0x1", "0x4000", "0x2000", "zeros"]


def test_unaligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With clusters above 4 KiB an offset can be unaligned without a reserved bit."""
    image = build_image(MIB, {0: b"x", 1: 0x11000}, cluster_size=1 << 16)
    path = tmp_path / "disk.qed"
    path.write_bytes(image)
    found = ranges(dump("l2", "0", path, capsys=capsys)[0])
    assert [item[3] for item in found] == ["ok", "unaligned"]


def test_operands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index is required for an L2 table, and refused elsewhere."""
    path = tmp_path / "disk.qed"
    path.write_bytes(build_image(MIB, {0: b"x"}))
    assert "found none" in dump("l2", path, capsys=capsys, code=1)[1]
    assert "found x" in dump("l2", "x", path, capsys=capsys, code=1)[1]
    assert "no table" in dump("l2", "1", path, capsys=capsys, code=1)[1]
    assert "0 to 511" in dump("l2", "512", path, capsys=capsys, code=1)[1]
    assert "two operands" in dump("l1", "1", path, capsys=capsys, code=1)[1]
    assert "structure" in dump("l3", path, capsys=capsys, code=1)[1]


@pytest.mark.parametrize("stored", [0, 1, 7])
def test_entry_past_the_end_of_the_file(
    stored: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An L1 entry that the file does not have whole is refused, whatever its first bytes are."""
    image = build_image(MIB, {0: b"x"})
    put_entry(image, CLUSTER_BYTES + 8, 1)
    path = tmp_path / "disk.qed"
    path.write_bytes(image[: CLUSTER_BYTES + 8 + stored])
    assert dump("l1", path, capsys=capsys)[0]["entries"][-1]["index"] == 0
    end = CLUSTER_BYTES + 8 + stored
    assert dump("l2", "1", path, capsys=capsys, code=1)[1] == (
        f"qedimg: {path}: L1 entry 1: found the end of the file at {end}, expected the entry up to "
        f"{CLUSTER_BYTES + 16}\n"
    )


def test_broken_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables of a broken header are listed if their place can still be determined."""
    path = tmp_path / "disk.qed"
    image = build_image(MIB, {0: b"x"})
    image[48:56] = b"\xff" * 8
    image[16] |= 64
    path.write_bytes(image)
    assert len(dump("header", path, capsys=capsys)[0]["problems"]) == 2
    assert len(dump("l2", "0", path, capsys=capsys)[0]["entries"]) == 1
    image[4:8] = (4097).to_bytes(4, "little")
    path.write_bytes(image)
    assert "cluster_size" in dump("l1", path, capsys=capsys, code=12)[1]
    path.write_bytes(image[:30])
    assert len(dump("header", path, capsys=capsys)[0]["fields"]) == 5
    assert "truncated" in dump("l1", path, capsys=capsys, code=12)[1]
    path.write_bytes(b"no image")
    assert "not a QED image" in dump("header", path, capsys=capsys, code=12)[1]
    assert "directory" in dump("header", tmp_path, capsys=capsys, code=12)[1]
    assert "No such file" in dump("header", tmp_path / "none", capsys=capsys, code=1)[1]


def test_random_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any content ends with a documented code and at most one line."""
    chance = random.Random(12)
    path = tmp_path / "random.qed"
    good = build_image(MIB, {0: b"x", 5: ZERO})
    for _ in range(200):
        image = bytearray(good if chance.randrange(2) else b"QED\0" + chance.randbytes(9000))
        for _ in range(chance.randrange(1, 9)):
            image[chance.randrange(4, min(len(image), 9000))] = chance.randrange(256)
        path.write_bytes(image[: chance.randrange(4, len(image) + 1)])
        for words in (["header"], ["l1"], ["l2", "0"]):
            code = main(["dump", *words, str(path)])
            assert code in (0, 1, 12)
            assert code == 0 or words != ["header"]
            assert capsys.readouterr().err.count("\n") == bool(code)


def test_beside_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use is dumped only with -U."""
    path = qemu.create(tmp_path / "disk.qed", MIB)
    with qemu.hold(path):
        assert "in use" in dump("l1", path, capsys=capsys, code=16)[1]
        assert dump("-U", "l1", path, capsys=capsys)[0]["entries"] == []


def test_a_hostile_image_takes_little_memory(tmp_path: Path) -> None:
    """A table of 1 GiB is printed while it is read."""
    header = Header(1 << 26, 16, 1, 0, 0, 0, 1 << 26, 1 << 60)
    path = tmp_path / "hostile.qed"
    with path.open("wb") as file:
        file.write(build_header(header))
        file.seek(header.l1_table_offset + (1 << 29))
        file.write(b"\7" * (1 << 20))
        file.truncate(header.l1_end)
    out, peak, _modules = memory.run("dump", "l1", path)
    counts = [int(line.split()[1]) for line in out.splitlines()[1:]]
    assert sum(counts) == 1 << 17
    assert len(counts) <= 1 << 5
    assert peak < 256 * MIB
