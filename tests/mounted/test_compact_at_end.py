"""Compaction at unmount: after a day of use the image has no leaked cluster for QEMU."""

from __future__ import annotations

import os
import random
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from tests.support import qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.disks import difference
from tests.support.extensions import needs_extensions
from tests.support.mounted import COMMAND, TIMEOUT, clean_up, mounted, qedfuse
from tests.support.programs import environment

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 1 << 20
UNLIMITED: Final = "compact_time=600"
"""Compaction runs to its end however slow the machine is; the limit has tests of its own."""


@needs_extensions
@pytest.mark.parametrize(("option", "code"), [(UNLIMITED, 0), ("compact=off", 3)])
def test_no_leaks_after_files_came_and_went(option: str, code: int, tmp_path: Path) -> None:
    """A guest makes a file system and files, deletes some and trims: QEMU's check exits with 0."""
    image = qemu.create(tmp_path / "vm.qed", 96 * MIB)
    chance = random.Random(5)
    kept = {}
    with (
        mounted(image, tmp_path / "mnt", "-o", option) as mountpoint,
        loop_device(mountpoint / "vm.raw") as device,
    ):
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        with file_system(device, tmp_path / "day") as directory:
            for number in range(24):
                content = chance.randbytes(chance.randrange(1, 2 * MIB))
                path = directory / f"file{number}"
                path.write_bytes(content)
                kept[number] = content
                if number % 3 == 2:
                    run("sync", "-f", directory)
                    for gone in chance.sample(sorted(kept), 2):
                        (directory / f"file{gone}").unlink()
                        del kept[gone]
                    run("fstrim", directory)
    found = qemu.check(image)
    assert (found.errors, found.code) == (0, code), found.text
    with (
        mounted(image, tmp_path / "mnt", "-r") as mountpoint,
        loop_device(mountpoint / "vm.raw", "--read-only") as device,
    ):
        run("e2fsck", "-fn", device)
        run("mount", "-o", "ro,noload", device, tmp_path / "day")
        try:
            for number, content in kept.items():
                assert (tmp_path / "day" / f"file{number}").read_bytes() == content
        finally:
            run("umount", tmp_path / "day")


@needs_extensions
@pytest.mark.parametrize("seed", range(3))
def test_no_leaks_after_random_writes_and_discards(seed: int, tmp_path: Path) -> None:
    """Random writes and discards leave no leak and the right content, whatever the geometry."""
    chance = random.Random(seed)
    cluster_size = chance.choice((4096, 16384, 65536))
    table_size = chance.choice((2, 4, 16))
    size = 12 * MIB
    image = qemu.create(tmp_path / "vm.qed", size, cluster_size=cluster_size, table_size=table_size)
    model = bytearray(size)
    for _ in range(2):
        with mounted(image, tmp_path / "mnt", "-o", UNLIMITED) as mountpoint:
            descriptor = os.open(mountpoint / "vm.raw", os.O_RDWR)
            try:
                for _ in range(60):
                    start = chance.randrange(size // 4096) * 4096
                    length = min(chance.choice((4096, 65536, 300_000, MIB)), size - start)
                    if chance.random() < 0.6:
                        model[start : start + length] = chance.randbytes(length)
                        os.pwrite(descriptor, model[start : start + length], start)
                    else:
                        model[start : start + length] = bytes(length)
                        fallocate(descriptor, FALLOC_PUNCH_HOLE, start, length)
                    if chance.random() < 0.1:
                        os.fsync(descriptor)
            finally:
                os.close(descriptor)
        assert qemu.check(image).code == 0, qemu.check(image).text
        assert difference(qemu.content(image), model) is None


def write_and_punch(image: Path, mountpoint: Path) -> None:
    """Fill 32 clusters of a mounted disk, and punch every third one of the first half."""
    with (mountpoint / f"{image.stem}.raw").open("r+b") as file:
        file.write(b"\xa5" * 2 * MIB)
        os.fsync(file.fileno())
        for number in range(0, 16, 3):
            fallocate(file.fileno(), FALLOC_PUNCH_HOLE, number * 65536, 65536)


@needs_extensions
def test_remaining_free_clusters_are_logged(tmp_path: Path) -> None:
    """The log says how many free clusters are left, as QEMU counts, and how to remove them."""
    image = qemu.create(tmp_path / "vm.qed", 8 * MIB)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = f"{UNLIMITED},compact_size=192K"
    process = subprocess.Popen(
        [*COMMAND, image, mountpoint, "-f", "-o", options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        while not (mountpoint / "vm.raw").exists():
            assert process.poll() is None
        write_and_punch(image, mountpoint)
        assert qedfuse("umount", mountpoint).returncode == 0
        assert process.wait(TIMEOUT) == 0
    finally:
        clean_up(mountpoint)
        process.kill()
        shown = process.communicate()[1]
    assert f"{image}: 3 free clusters (196608 bytes) are left within the file" in shown
    assert f"to remove them: qedimg compact {image}" in shown
    found = qemu.check(image)
    assert (found.code, found.leaks) == (3, 3)
    assert main(["compact", "-q", str(image)]) == 0
    assert qemu.check(image).code == 0


@needs_extensions
def test_images_of_a_mount_share_compact_time(tmp_path: Path) -> None:
    """When compact_time has passed, compaction stops for all images, and all are closed."""
    images = [qemu.create(tmp_path / f"{name}.qed", 8 * MIB) for name in "ab"]
    with mounted(tmp_path, tmp_path / "mnt", "-o", "compact_time=0.000001") as mountpoint:
        for image in images:
            write_and_punch(image, mountpoint)
    for image in images:
        assert (qemu.check(image).errors, qemu.check(image).leaks) == (0, 6)
