"""``qedimg info --partitions`` compared with sfdisk and blkid."""

from __future__ import annotations

import json
import os
import random
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest

from qedfuse.cli.qedimg.main import main
from tests.support.partitiontables import draw_table, partition
from tests.support.servers import missing_programs

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]
MIB = 1 << 20


def by_sfdisk(disk: Path) -> dict[str, Any]:
    """Return the partition table that sfdisk finds."""
    done = subprocess.run(
        ["sfdisk", "--json", str(disk)], capture_output=True, text=True, check=True
    )
    table: dict[str, Any] = json.loads(done.stdout)["partitiontable"]
    return table


def by_qedimg(capsys: Captured, image: Path) -> dict[str, Any]:
    """Return what ``qedimg info --partitions`` prints as JSON."""
    assert main(["info", "--partitions", "--output", "json", str(image)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["partitions"]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_table_is_that_of_sfdisk(seed: int, tmp_path: Path, capsys: Captured) -> None:
    """Numbers, places, types, UUIDs and names are those that sfdisk finds in a raw file."""
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qed"
    with disk.open("wb") as file:
        file.truncate(100 * MIB)
    partition(disk, draw_table(random.Random(seed)))
    subprocess.run(["qemu-img", "convert", "-O", "qed", disk, image], check=True)
    expected, found = by_sfdisk(disk), by_qedimg(capsys, image)
    assert (found["table"], found["id"]) == (expected["label"], expected["id"])
    assert not found["problems"]
    prefix = str(disk)
    assert [
        (item["number"], item["start"], item["length"], item["type"], item["bootable"],
         item["uuid"], item["name"])
        for item in found["partitions"]
    ] == [
        (int(item["node"].removeprefix(prefix)), item["start"] * 512, item["size"] * 512,
         item["type"], item.get("bootable", False), item.get("uuid"), item.get("name"))
        for item in expected.get("partitions", [])
    ]  # fmt: skip


def test_sectors_of_4096_bytes_are_found(tmp_path: Path, capsys: Captured) -> None:
    """A GPT that counts in sectors of 4096 bytes is found."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(100 * MIB)
    # Only newer versions of sfdisk know --sector-size.
    commands = "g\nn\n1\n\n+10M\nn\n2\n\n+5M\nw\n"
    subprocess.run(
        ["fdisk", "-b", "4096", str(disk)],
        input=commands, text=True, check=True, capture_output=True,
    )  # fmt: skip
    found = by_qedimg(capsys, disk)
    assert found["sector-size"] == 4096
    assert [item["length"] for item in found["partitions"]] == [10 * MIB, 5 * MIB]


def test_file_systems_are_named(tmp_path: Path, capsys: Captured) -> None:
    """A partition has the file system, label and UUID with which it was made."""
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qed"
    with disk.open("wb") as file:
        file.truncate(100 * MIB)
    partition(disk, ["label: gpt", "size=20M, type=L", "size=20M, type=S", "size=20M, type=U"])
    places = [item["start"] * 512 for item in by_sfdisk(disk)["partitions"]]
    part = tmp_path / "part"
    uuid = "8a7e27c9-5d5b-4b7e-a3f3-0c5a3c1b9d10"
    for place, command in zip(
        places,
        (
            ["mkfs.ext4", "-q", "-L", "root fs", "-U", uuid],
            ["mkswap", "-q", "-L", "swp", "-U", uuid],
            ["mkfs.fat", "-n", "EFI", "-i", "1234ABCD"],
        ),
        strict=True,
    ):
        part.write_bytes(b"")
        with part.open("r+b") as file:
            file.truncate(20 * MIB)
        subprocess.run([*command, str(part)], check=True, capture_output=True)
        with disk.open("r+b") as file:
            file.seek(place)
            file.write(part.read_bytes())
    subprocess.run(["qemu-img", "convert", "-O", "qed", disk, image], check=True)
    found = by_qedimg(capsys, image)
    assert [item["file-system"] for item in found["partitions"]] == [
        {"type": "ext4", "label": "root fs", "uuid": uuid},
        {"type": "swap", "label": "swp", "uuid": uuid},
        {"type": "vfat", "label": "EFI", "uuid": "1234-ABCD"},
    ]
    assert main(["info", "--partitions", str(image)]) == 0
    text = capsys.readouterr().out
    assert "2: 20 MiB at 22020096, Linux swap, swap labelled swp" in text


LABELS: Final[dict[str, tuple[str, str | bytes, str, str]]] = {
    "space": ("mkfs.ext4", "root fs", "root fs", "root fs"),
    "quotes": ("mkfs.ext4", "a\"b'c`d", "a\"b'c`d", "a\"b'c`d"),
    "backslash": ("mkfs.ext4", "a\\b\\x20", "a\\b\\x20", "a\\b\\x20"),
    "shell": ("mkfs.ext4", "<$HOME>", "<$HOME>", "<$HOME>"),
    "caret": ("mkfs.ext4", "^A M-^B", "^A M-^B", "^A M-^B"),
    "umlauts": ("mkfs.ext4", "Grüße", "Grüße", "Grüße"),
    "newline": ("mkfs.ext4", "a\nTYPE=xfs", "a\nTYPE=xfs", r"a\nTYPE=xfs"),
    "escape": ("mkfs.ext4", "\x1b[31m", "\x1b[31m", r"\x1b[31m"),
    "latin-1": ("mkfs.ext4", b"b\xf6se", "b\ufffdse", "b\ufffdse"),
    "swap": ("mkswap", 'ä "b"', 'ä "b"', 'ä "b"'),
    "fat": ("mkfs.fat", "A 'B^A", "A 'B^A", "A 'B^A"),
    "ntfs": ("mkfs.ntfs", 'ü "\\' * 9, 'ü "\\' * 9, 'ü "\\' * 9),
}
"""The program, the label that it gets, and the label as JSON and as text."""


@pytest.mark.parametrize("name", LABELS)
def test_a_label_is_what_mkfs_was_given(name: str, tmp_path: Path, capsys: Captured) -> None:
    """A label has no escapes of blkid, and as text none of its characters is harmful."""
    program, given, as_json, as_text = LABELS[name]
    if missing_programs(program):
        pytest.skip(f"not installed: {program}")
    options = {
        "mkfs.ext4": ["-q", "-L"],
        "mkswap": ["-q", "-L"],
        "mkfs.fat": ["-n"],
        "mkfs.ntfs": ["-q", "-Q", "-F", "-L"],
    }[program]
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(
        [program, *options, given, str(disk)],
        check=True, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert by_qedimg(capsys, disk)["file-system"]["label"] == as_json
    assert main(["info", "--partitions", str(disk)]) == 0
    assert f" labelled {as_text} (" in capsys.readouterr().out


def test_a_disk_without_partitions(tmp_path: Path, capsys: Captured) -> None:
    """A file system that begins at the first sector is named, and has no partitions."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    assert main(["info", "--partitions", str(disk)]) == 0
    assert capsys.readouterr().out.endswith("\npartition table: none\n")
    subprocess.run(["mkfs.fat", "-n", "WHOLE", str(disk)], check=True, capture_output=True)
    found = by_qedimg(capsys, disk)
    assert found["table"] is None
    assert (found["file-system"]["type"], found["file-system"]["label"]) == ("vfat", "WHOLE")
