"""Discard, fallocate(2) and lseek(2) end to end: freed space leaves the image, holes are holes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import qedfuse
from qedfuse.hostio.systemcalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
from tests.support import qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.disks import difference, header_of
from tests.support.extensions import needs_extensions
from tests.support.mounted import COMMAND, TIMEOUT, WITHOUT_EXTENSION, clean_up, mounted
from tests.support.programs import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20
CLUSTER_BYTES: Final = 65536
FALLOC_ZERO_RANGE: Final = 16


def blocks(path: Path) -> int:
    """Give the bytes that a file takes up on its file system."""
    return path.stat().st_blocks * 512


def extents(path: Path) -> list[tuple[int, int]]:
    """List where a file holds data, as lseek(2) reports it."""
    result = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            result.append((start, at))
    return result


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image of 64 MiB."""
    return qemu.create(tmp_path / "vm.qed", 64 * MIB)


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Iterator[Path]:
    """Give that image, mounted, with data from 1 MiB to 4 MiB."""
    with mounted(image, tmp_path / "mnt") as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b") as file:
            file.seek(MIB)
            file.write(b"\xa5" * 3 * MIB)
            os.fsync(file.fileno())
        yield path
    assert qemu.check(image).errors == 0


@needs_extensions
@pytest.mark.parametrize(
    "mode", [FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE]
)
def test_a_discarded_range_reads_as_zeros_and_takes_no_space(
    mode: int, disk: Path, image: Path
) -> None:
    """Whole clusters of a discarded range leave the image by the next fsync; st_blocks follows."""
    before = blocks(image)
    with disk.open("r+b") as file:
        fallocate(file.fileno(), mode, MIB + 100, 2 * MIB)
        os.fsync(file.fileno())
        assert blocks(disk) == blocks(image)
        assert before - blocks(image) >= 2 * MIB - 2 * CLUSTER_BYTES
        file.seek(0)
        expected = bytes(MIB) + b"\xa5" * 100 + bytes(2 * MIB) + b"\xa5" * (MIB - 100)
        assert difference(file.read(4 * MIB), expected) is None


@needs_extensions
def test_a_discard_drops_cached_pages(disk: Path) -> None:
    """After a discard, neither unsynced writes nor pages that were read before come back."""
    with disk.open("r+b") as file:
        file.write(b"\x5a" * MIB)
        file.flush()
        file.seek(0)
        file.read(4 * MIB)
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 0, 2 * MIB)
        file.seek(0)
        assert not any(file.read(2 * MIB))
        file.seek(CLUSTER_BYTES)
        file.write(b"new")
        file.flush()
        os.fsync(file.fileno())
        file.seek(CLUSTER_BYTES)
        assert file.read(10) == b"new" + bytes(7)


@pytest.mark.parametrize("mode", [8, 0x20, 0x40])
def test_other_fallocate_modes_are_refused(mode: int, disk: Path) -> None:
    """Modes such as collapse and insert fail with EOPNOTSUPP, so that programs fall back."""
    with disk.open("r+b") as file, pytest.raises(OSError) as caught:  # noqa: PT011
        fallocate(file.fileno(), mode, MIB, MIB)
    assert caught.value.errno == errno.EOPNOTSUPP


@needs_extensions
def test_fallocate_at_the_end_of_the_disk(disk: Path, image: Path) -> None:
    """A punch past the end is cut there, an allocation past it fails, and the size stays."""
    with disk.open("r+b") as file:
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 3 * MIB, 1 << 40)
        fallocate(file.fileno(), FALLOC_KEEP_SIZE, 60 * MIB, 4 * MIB)
        for mode in (FALLOC_ZERO_RANGE, FALLOC_KEEP_SIZE, 0):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                fallocate(file.fileno(), mode, 50 * MIB, 15 * MIB)
            assert caught.value.errno == errno.ENOSPC
    assert blocks(image) < 9 * MIB, "nothing for a request that fails"
    assert disk.stat().st_size == 64 * MIB
    assert blocks(image) >= 4 * MIB, "space for the last 4 MiB has been set aside"


@needs_extensions
def test_zeroing_past_the_end_grows_a_growable_disk(image: Path, tmp_path: Path) -> None:
    """A zero range past the end of a growable disk makes it larger, like any file."""
    with mounted(image, tmp_path / "mnt", "-o", "growable") as mountpoint:
        run("fallocate", "-z", "-o", "63MiB", "-l", "2MiB", mountpoint / "vm.raw")
        assert (mountpoint / "vm.raw").stat().st_size == 65 * MIB
    assert header_of(image.read_bytes()[:64]).image_size == 65 * MIB


@needs_extensions
@pytest.mark.parametrize("options", [(), ("-o", "direct_io")])
def test_allocated_space_is_reserved_on_the_host(
    options: tuple[str, ...], image: Path, tmp_path: Path
) -> None:
    """Space allocated by fallocate(1) or posix_fallocate(3) is reserved and keeps its content."""
    with mounted(image, tmp_path / "mnt", *options) as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b", buffering=0) as file:
            file.seek(MIB)
            file.write(b"\xa5" * 100)
            run("fallocate", "-l", "4MiB", path)
            os.posix_fallocate(file.fileno(), 32 * MIB + 1, 4 * MIB)
            os.fsync(file.fileno())
            assert blocks(image) >= 8 * MIB
            assert path.stat().st_size == 64 * MIB
            file.seek(0)
            expected = bytes(MIB) + b"\xa5" * 100 + bytes(35 * MIB)
            assert difference(file.read(len(expected)), expected) is None
    assert qemu.check(image).errors == 0


@needs_extensions
@pytest.mark.parametrize("options", ["growable", "growable,direct_io"])
def test_allocation_past_the_end_grows_a_growable_disk(
    options: str, image: Path, tmp_path: Path
) -> None:
    """An allocation past the end grows the disk; KEEP_SIZE and too large sizes change nothing."""
    with mounted(image, tmp_path / "mnt", "-o", options) as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b", buffering=0) as file:
            file.seek(64 * MIB - 5)
            file.write(b"12345")
            for mode, length, number in (
                (FALLOC_KEEP_SIZE, 2 * MIB, errno.EOPNOTSUPP),
                (0, 1 << 60, errno.EFBIG),
                (FALLOC_ZERO_RANGE, 1 << 60, errno.EFBIG),
            ):
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    fallocate(file.fileno(), mode, 63 * MIB, length)
                assert caught.value.errno == number
            with pytest.raises(OSError) as caught:  # noqa: PT011
                os.ftruncate(file.fileno(), 1 << 60)
            assert caught.value.errno == errno.EFBIG
            assert path.stat().st_size == 64 * MIB
            run("fallocate", "-o", "63MiB", "-l", "3MiB", path)
            assert path.stat().st_size == 66 * MIB
            os.fsync(file.fileno())
            assert blocks(image) >= 3 * MIB
            file.seek(63 * MIB)
            assert file.read() == bytes(MIB - 5) + b"12345" + bytes(2 * MIB)
    assert header_of(image.read_bytes()[:64]).image_size == 66 * MIB
    assert qemu.check(image).errors == 0


@needs_extensions
def test_a_read_only_disk_refuses_discards(image: Path, tmp_path: Path) -> None:
    """A discard of a read-only disk fails, and the image stays the same byte for byte."""
    before = image.read_bytes()
    with mounted(image, tmp_path / "mnt", "-o", "ro") as mountpoint:
        done = subprocess.run(
            ["fallocate", "-p", "-l", "1MiB", mountpoint / "vm.raw"],
            capture_output=True,
            check=False,
        )
        assert done.returncode != 0
    assert image.read_bytes() == before


@needs_extensions
def test_nodiscard_keeps_the_clusters(image: Path, tmp_path: Path) -> None:
    """With nodiscard a punched range reads as zeros and keeps its clusters."""
    with mounted(image, tmp_path / "mnt", "-o", "nodiscard") as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b") as file:
            file.write(b"\xa5" * MIB)
            os.fsync(file.fileno())
            before = qemu.map_extents(image, image_format="raw")
            fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 0, MIB)
            os.fsync(file.fileno())
            file.seek(0)
            assert not any(file.read(MIB))
        assert qemu.map_extents(image, image_format="raw") == before
    assert sum(item["length"] for item in qemu.map_extents(image) if item["data"]) == MIB


@needs_extensions
@pytest.mark.parametrize(("mode", "kept"), [("off", True), ("on", True), ("unmap", False)])
def test_detect_zeroes_mode(mode: str, *, kept: bool, image: Path, tmp_path: Path) -> None:
    """Written zeros take no space with detect_zeroes=on, and free space only with unmap."""
    with mounted(image, tmp_path / "mnt", "-o", f"detect_zeroes={mode}") as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b") as file:
            file.write(b"\xa5" * MIB)
            os.fsync(file.fileno())
            file.seek(0)
            file.write(bytes(4 * MIB))
            os.fsync(file.fileno())
        used = sum(end - start for start, end in extents(path))
        assert used == (4 * MIB if mode == "off" else MIB if kept else 0)


# --- holes -------------------------------------------------------------------------------


@needs_extensions
def test_holes_along_a_chain(tmp_path: Path) -> None:
    """Holes of an overlay and of its sparse raw base are reported, and zero clusters are holes."""
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        for at in (1, 5, 9):
            file.seek(at * MIB)
            file.write(b"b" * CLUSTER_BYTES)
        file.truncate(32 * MIB)
    overlay = qemu.create(tmp_path / "vm.qed", 40 * MIB, backing=base, backing_format="raw")
    with mounted(overlay, tmp_path / "mnt") as mountpoint:
        path = mountpoint / "vm.raw"
        with path.open("r+b") as file:
            file.seek(20 * MIB)
            file.write(b"o" * CLUSTER_BYTES)
            fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 5 * MIB, CLUSTER_BYTES)
        starts = [at * MIB for at in (1, 9, 20)]
        assert extents(path) == [(start, start + CLUSTER_BYTES) for start in starts]
        with path.open("rb") as file:
            assert os.lseek(file.fileno(), 2 * MIB, os.SEEK_HOLE) == 2 * MIB
            with pytest.raises(OSError) as caught:  # noqa: PT011
                os.lseek(file.fileno(), 40 * MIB, os.SEEK_HOLE)
            assert caught.value.errno == errno.ENXIO


@needs_extensions
def test_copies_are_no_larger_than_the_data(disk: Path, tmp_path: Path) -> None:
    """Sparse copies by cp, tar and qemu-img take no more space than the data."""
    copies = [tmp_path / name for name in ("cp.raw", "qemu.raw", "tar/vm.raw")]
    copies[2].parent.mkdir()
    run("cp", "--sparse=auto", disk, copies[0])
    qemu.convert(disk, copies[1], source_format="raw", target_format="raw")
    run("tar", "-C", disk.parent, "-S", "-cf", tmp_path / "vm.tar", "vm.raw")
    run("tar", "-C", copies[2].parent, "-xf", tmp_path / "vm.tar")
    assert blocks(tmp_path / "vm.tar") < 4 * MIB
    for copy in copies:
        assert blocks(copy) <= 3 * MIB + CLUSTER_BYTES, copy
        run("cmp", disk, copy)


@needs_extensions
def test_no_hole_is_reported_over_dirty_pages(disk: Path) -> None:
    """Data that was written and not synced is data for lseek(2) through any descriptor."""
    chance = random.Random(5)
    with disk.open("r+b", buffering=0) as writer, disk.open("rb", buffering=0) as reader:
        for _ in range(40):
            at = chance.randrange(8, 60) * MIB + chance.choice((0, 4096, 12345))
            writer.seek(at)
            writer.write(b"w" * chance.choice((1, 5000, 200_000)))
            found = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            assert found == at
            assert os.lseek(reader.fileno(), at, os.SEEK_HOLE) > at


def test_a_sparse_copy_beside_a_writer_is_complete(disk: Path, tmp_path: Path) -> None:
    """Sparse copies of a disk in use succeed, and a copy of the frozen disk is equal to it."""
    with loop_device(disk) as device:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1", device)
        with file_system(device, tmp_path / "fs") as mountpoint:
            stop = threading.Event()
            written: list[Path] = []

            def write() -> None:
                while not stop.is_set():
                    path = mountpoint / f"file{len(written) % 9}"
                    path.write_bytes(os.urandom(700_000))
                    written.append(path)

            writer = threading.Thread(target=write)
            writer.start()
            try:
                for number in range(6):
                    run("cp", "--sparse=always", disk, tmp_path / f"copy{number}")
            finally:
                stop.set()
                writer.join()
            assert written, "nothing was written beside the copies"
            run("fsfreeze", "-f", mountpoint)
            try:
                run("cp", "--sparse=auto", disk, tmp_path / "copy")
                run("cmp", disk, tmp_path / "copy")
            finally:
                run("fsfreeze", "-u", mountpoint)


# --- block devices and file systems -----------------------------------------------------


@needs_extensions
def test_discards_of_a_loop_device(disk: Path, image: Path) -> None:
    """A discard or zeroing by blkdiscard(8) on a loop device frees clusters and leaves zeros."""
    with loop_device(disk) as device:
        for flags in ([], ["-z"]):
            run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "conv=fsync")
            before = blocks(image)
            run("blkdiscard", *flags, "-l", "8MiB", device)
            with Path(device).open("r+b") as file:
                os.fsync(file.fileno())
                assert not any(file.read(8 * MIB))
            assert blocks(image) <= before - 8 * MIB, flags


@needs_extensions
def test_fstrim_keeps_the_image_small(tmp_path: Path) -> None:
    """Four times 100 MB written, deleted and trimmed on a disk of 300 MB leave a small image."""
    image = qemu.create(tmp_path / "vm.qed", 300 * MIB)
    with (
        mounted(image, tmp_path / "mnt") as mountpoint,
        loop_device(mountpoint / "vm.raw") as device,
    ):
        run("mkfs.ext4", "-q", device)
        with file_system(device, tmp_path / "fs") as files:
            for _ in range(4):
                with (files / "big").open("wb") as file:
                    file.write(os.urandom(100_000_000))
                    os.fsync(file.fileno())
                (files / "big").unlink()
                run("sync", "-f", files)
                run("fstrim", files)
                assert image.stat().st_size < 130_000_000
    assert qemu.check(image).errors == 0
    assert blocks(image) < 20 * MIB


@needs_extensions
def test_a_file_system_mounted_with_discard(tmp_path: Path) -> None:
    """A file system mounted with -o discard frees deleted files without fstrim."""
    image = qemu.create(tmp_path / "vm.qed", 200 * MIB)
    with (
        mounted(image, tmp_path / "mnt") as mountpoint,
        loop_device(mountpoint / "vm.raw") as device,
    ):
        run("mkfs.ext4", "-q", device)
        files = tmp_path / "fs"
        files.mkdir()
        run("mount", "-o", "discard", device, files)
        try:
            for _ in range(4):
                (files / "big").write_bytes(os.urandom(60 * MIB))
                run("sync", "-f", files)
                (files / "big").unlink()
                # ext4 discards in the background, and gives that up when it is unmounted.
                end = time.monotonic() + TIMEOUT
                while blocks(image) >= 40 * MIB:
                    assert time.monotonic() < end
                    run("sync", "-f", files)
        finally:
            run("umount", files)
    assert qemu.check(image).errors == 0
    assert image.stat().st_size < 130 * MIB


# --- without the extension ---------------------------------------------------


def test_without_the_extension(image: Path, tmp_path: Path) -> None:
    """Without the extension the mount works, says so once, and refuses discards."""
    package = Path(qedfuse.__file__).parent
    copy = tmp_path / "tree/qedfuse"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    try:
        done = subprocess.run(
            [*COMMAND, image, mountpoint],
            env={**environment(), "PYTHONPATH": str(copy.parent)},
            cwd=copy.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == WITHOUT_EXTENSION
        path = mountpoint / "vm.raw"
        with path.open("r+b") as file:
            file.write(b"x")
            file.flush()
            with pytest.raises(OSError) as caught:  # noqa: PT011
                fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 0, MIB)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 64 * MIB
        run(sys.executable, "-m", "qedfuse", "umount", mountpoint)
    finally:
        clean_up(mountpoint)
