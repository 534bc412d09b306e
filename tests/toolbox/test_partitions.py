"""``qedimg info --partitions`` compared with sfdisk and blkid."""

from __future__ import annotations

import json
import random
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from qedfuse.cli.qedimg.main import main
from tests.support.partitiontables import draw_table, partition

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
    """A partition has the file system, label and UUID that blkid finds in it."""
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qed"
    with disk.open("wb") as file:
        file.truncate(100 * MIB)
    partition(disk, ["label: gpt", "size=20M, type=L", "size=20M, type=S", "size=20M, type=U"])
    places = [item["start"] * 512 for item in by_sfdisk(disk)["partitions"]]
    part = tmp_path / "part"
    expected = []
    for place, command in zip(
        places,
        (
            ["mkfs.ext4", "-q", "-L", "root fs"],
            ["mkswap", "-q", "-L", "swp"],
            ["mkfs.fat", "-n", "EFI"],
        ),
        strict=True,
    ):
        part.write_bytes(b"")
        with part.open("r+b") as file:
            file.truncate(20 * MIB)
        subprocess.run([*command, str(part)], check=True, capture_output=True)
        values = subprocess.run(
            ["blkid", "--probe", "--output", "export", str(part)],
            capture_output=True, text=True, check=True,
        ).stdout.split("\n")  # fmt: skip
        known = dict(value.split("=", 1) for value in values if "=" in value)
        expected.append({"type": known["TYPE"], "label": known["LABEL"], "uuid": known["UUID"]})
        with disk.open("r+b") as file:
            file.seek(place)
            file.write(part.read_bytes())
    subprocess.run(["qemu-img", "convert", "-O", "qed", disk, image], check=True)
    found = by_qedimg(capsys, image)
    assert [item["file-system"] for item in found["partitions"]] == expected
    assert [item["type"] for item in expected] == ["ext4", "swap", "vfat"]
    assert main(["info", "--partitions", str(image)]) == 0
    text = capsys.readouterr().out
    assert "2: 20 MiB at 22020096, Linux swap, swap labelled swp" in text


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
