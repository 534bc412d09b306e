"""Truncation is refused or empties the disk: success is never reported for anything else.

Each way of truncation, in each way of mounting that the kernel treats differently, is
compared with a model: the disk as a `bytearray`.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.disks import header_of
from tests.support.mounted import front, mounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK_BYTES: Final = (4 << 20) + 512
PAGE_BYTES: Final = 4096
OLD: Final = b"\xff"

MOUNTS: Final = {
    "cached": (),
    "direct_io": ("direct_io",),
    "file": (),
    "growable": ("growable",),
    "growable_file": ("growable",),
    "nodiscard": ("nodiscard",),
}
"""The ways of mounting, and their options; those with ``file`` in the name are on a file."""

WAYS: Final[dict[str, Callable[[Path, int], None]]] = {
    "O_WRONLY": lambda disk, _fd: os.close(os.open(disk, os.O_WRONLY | os.O_TRUNC)),
    "O_RDWR": lambda disk, _fd: os.close(os.open(disk, os.O_RDWR | os.O_CREAT | os.O_TRUNC)),
    "O_RDONLY": lambda disk, _fd: os.close(os.open(disk, os.O_RDONLY | os.O_TRUNC)),
    "by path": lambda disk, _fd: os.truncate(disk, 0),
    "by handle": lambda _disk, fd: os.ftruncate(fd, 0),
}
"""The ways of truncation to 0."""

COMMANDS: Final = {
    "cp": 'cp "$1" "$2"',
    "cp --sparse=always": 'cp --sparse=always "$1" "$2"',
    "cp --sparse=never": 'cp --sparse=never "$1" "$2"',
    "dd": 'dd if="$1" of="$2" bs=64k status=none',
    "dd conv=sparse": 'dd if="$1" of="$2" bs=64k conv=sparse status=none',
    "dd conv=fsync": 'dd if="$1" of="$2" bs=1000 conv=fsync status=none',
    "tar": 'tar -cSf "$1.tar" -C "${1%/*}" "${1##*/}" && tar xOf "$1.tar" >"$2"',
    "cat": 'cat "$1" >"$2"',
}
"""Programs that restore a disk from the file "$1"."""


@contextmanager
def mount_full(directory: Path, way: str, *options: str) -> Iterator[Path]:
    """Mount an image full of old bytes; give the disk; the image is sound afterwards."""
    image = qemu.create(directory / "vm.qed", DISK_BYTES)
    qemu.io(image, f"write -P 0xff 0 {DISK_BYTES}")
    mountpoint = directory / "mnt"
    words = ",".join((*MOUNTS[way], *options))
    if "file" in way:
        mountpoint.touch()
    with mounted(image, mountpoint, *(("-o", words) if words else ())) as point:
        yield point if "file" in way else point / "vm.raw"
    assert qemu.check(image).errors == 0


def make_backup(directory: Path) -> Path:
    """Make a raw backup with some data, also in its last sector, and many zeros."""
    source = directory / "backup.raw"
    with source.open("wb") as file:
        file.truncate(DISK_BYTES)
        for start, length in ((0, 1), (70_000, 5_000), (2 << 20, 1 << 20), (DISK_BYTES - 512, 512)):
            file.seek(start)
            file.write(random.Random(start).randbytes(length))
    return source


def run(command: str, source: Path, disk: Path) -> int:
    """Run one of the commands; give its exit code."""
    done = subprocess.run(["sh", "-c", command, "sh", source, disk], check=False)
    return done.returncode


def read_direct(disk: Path) -> bytes:
    """Read a disk with O_DIRECT, past the kernel's cache."""
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, DISK_BYTES + PAGE_BYTES) as buffer:
            return buffer[: os.preadv(fd, [buffer], 0)]
    finally:
        os.close(fd)


def read_mapped(disk: Path) -> bytes:
    """Read a disk through a memory map."""
    with disk.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        return pages[:]


@pytest.mark.parametrize("way", ["cached", "direct_io", "file", "growable"])
def test_truncation_is_refused_by_default(way: str, tmp_path: Path) -> None:
    """By path, by handle and with O_TRUNC: EPERM, and every byte stays."""
    with mount_full(tmp_path, way) as disk:
        fd = os.open(disk, os.O_RDWR)
        for truncate in WAYS.values():
            os.pwrite(fd, b"new", 100)
            with pytest.raises(PermissionError) as caught:
                truncate(disk, fd)
            assert caught.value.errno == errno.EPERM
        os.close(fd)
        expected = OLD * 100 + b"new" + OLD * (DISK_BYTES - 103)
        assert disk.stat().st_size == DISK_BYTES
        assert disk.read_bytes() == expected
        assert read_direct(disk) == expected


def test_programs_fail_by_default(tmp_path: Path) -> None:
    """Programs that truncate their target fail by default, and the disk does not change."""
    backup = make_backup(tmp_path)
    with mount_full(tmp_path, "cached") as disk:
        for command in COMMANDS.values():
            assert run(command, backup, disk) != 0, command
        assert run('truncate -s 0 "$2"', backup, disk) != 0
        assert disk.read_bytes() == OLD * DISK_BYTES
        assert run('dd if="$1" of="$2" bs=64k conv=notrunc status=none', backup, disk) == 0
        assert disk.read_bytes() == backup.read_bytes()


def test_a_refused_truncation_is_logged_once_for_each_disk(tmp_path: Path) -> None:
    """The first refusal of each disk logs a line with three alternatives."""
    images = [qemu.create(tmp_path / name, DISK_BYTES) for name in ("a.qed", "b.qed")]
    with front(*images, tmp_path / "mnt") as mount:
        for name in ("a.raw", "b.raw"):
            for _ in range(3):
                with pytest.raises(PermissionError):
                    os.truncate(mount.mountpoint / name, 0)
        lines = [mount.read_line() for _ in images]
        mount.process.terminate()
        code, rest = mount.finish()
    assert code == 0
    assert "was refused" not in rest
    for line, image in zip(lines, images, strict=True):
        assert str(image) in line
        for words in ("conv=notrunc", "qedimg convert -n", "-o truncate=zero"):
            assert words in line


@pytest.mark.parametrize("way", ["cached", "direct_io", "growable_file", "nodiscard"])
def test_programs_restore_a_disk(way: str, tmp_path: Path) -> None:
    """With truncate=zero cp, dd, tar and cat restore a backup, however they treat zeros."""
    backup = make_backup(tmp_path)
    expected = backup.read_bytes()
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        for name, command in COMMANDS.items():
            with disk.open("r+b") as file:
                file.write(OLD * DISK_BYTES)
            assert disk.read_bytes() == OLD * DISK_BYTES
            assert run(command, backup, disk) == 0, name
            assert disk.stat().st_size == DISK_BYTES
            assert read_direct(disk) == expected, name
        assert disk.read_bytes() == expected
        for command in (': >"$2"', 'truncate -s 0 "$2"'):
            assert run(command, backup, disk) == 0
            assert disk.read_bytes() == bytes(DISK_BYTES)
            assert run('cat "$1" 1<>"$2"', backup, disk) == 0
        assert run('echo short >"$2"', backup, disk) == 0
        assert disk.read_bytes() == b"short\n" + bytes(DISK_BYTES - 6)


def test_a_copy_from_one_disk_of_a_mount_to_another(tmp_path: Path) -> None:
    """A copy between two disks of a mount by cp, which leaves out holes, is exact."""
    images = tmp_path / "images"
    images.mkdir()
    source = qemu.create(images / "source.qed", DISK_BYTES)
    qemu.io(source, "write -P 1 1M 64k")
    target = qemu.create(images / "target.qed", DISK_BYTES)
    qemu.io(target, f"write -P 0xff 0 {DISK_BYTES}")
    with mounted(images, tmp_path / "mnt", "-o", "truncate=zero") as mountpoint:
        subprocess.run(["cp", mountpoint / "source.raw", mountpoint / "target.raw"], check=True)
        assert (mountpoint / "target.raw").read_bytes() == (mountpoint / "source.raw").read_bytes()
    assert qemu.content(target) == qemu.content(source)


@pytest.mark.parametrize("way", ["cached", "direct_io", "file"])
def test_a_truncated_disk_shows_no_old_data(way: str, tmp_path: Path) -> None:
    """Data that was cached or mapped before reads as zeros, and what is written then is kept."""
    expected = bytes(3 * PAGE_BYTES - 1) + b"new" + bytes(DISK_BYTES - 3 * PAGE_BYTES - 2)
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        fd = os.open(disk, os.O_RDWR)
        mapped = mmap.mmap(fd, DISK_BYTES, access=mmap.ACCESS_READ) if way != "direct_io" else None
        for truncate in WAYS.values():
            os.pwrite(fd, OLD * DISK_BYTES, 0)
            os.pwrite(fd, b"not synced", 5000)
            cached = disk.read_bytes()
            assert cached[:16] == OLD * 16
            assert mapped is None or mapped[:] == cached
            truncate(disk, fd)
            assert os.fstat(fd).st_size == disk.stat().st_size == DISK_BYTES
            assert mapped is None or mapped[:] == bytes(DISK_BYTES)
            assert os.lseek(fd, 0, os.SEEK_END) == DISK_BYTES
            assert os.pread(fd, DISK_BYTES, 0) == bytes(DISK_BYTES)
            assert read_direct(disk) == read_mapped(disk) == bytes(DISK_BYTES)
            os.pwrite(fd, b"new", 3 * PAGE_BYTES - 1)
            assert disk.read_bytes() == read_direct(disk) == expected
            assert mapped is None or mapped[:] == expected
        os.close(fd)
        if mapped is not None:
            mapped.close()
    assert qemu.content(tmp_path / "vm.qed") == expected


@pytest.mark.parametrize("way", ["cached", "file"])
def test_dirty_pages_of_a_map_do_not_come_back(way: str, tmp_path: Path) -> None:
    """Dirty pages of a memory map are dropped by a truncation and never written after it."""
    expected = bytes(PAGE_BYTES) + b"\2" + bytes(DISK_BYTES - PAGE_BYTES - 1)
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        fd = os.open(disk, os.O_RDWR)
        with mmap.mmap(fd, DISK_BYTES) as mapped:
            for truncate in (WAYS["O_WRONLY"], WAYS["by handle"]):
                for at in range(0, DISK_BYTES, PAGE_BYTES):
                    mapped[at] = 1
                truncate(disk, fd)
                assert disk.stat().st_size == os.fstat(fd).st_size == DISK_BYTES
                assert (
                    disk.read_bytes() == read_direct(disk) == read_mapped(disk) == bytes(DISK_BYTES)
                )
                assert mapped[:] == bytes(DISK_BYTES)
                mapped[PAGE_BYTES] = 2
                mapped.flush()
                os.fsync(fd)
                assert disk.read_bytes() == read_direct(disk) == expected
        os.close(fd)
    assert qemu.content(tmp_path / "vm.qed") == expected


@pytest.mark.parametrize("way", ["cached", "growable", "file"])
def test_a_smaller_size_zeros_what_lies_past_it(way: str, tmp_path: Path) -> None:
    """A truncation to a smaller size zeros what lies past it and keeps dirty pages before it."""
    cut = (1 << 20) + 1000
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        fd = os.open(disk, os.O_RDWR)
        with mmap.mmap(fd, DISK_BYTES) as mapped:
            for at in (0, cut - 1, cut, DISK_BYTES - 1):
                mapped[at] = 1
            os.ftruncate(fd, cut)
            assert disk.stat().st_size == os.fstat(fd).st_size == DISK_BYTES
            expected = b"\1" + OLD * (cut - 2) + b"\1" + bytes(DISK_BYTES - cut)
            assert disk.read_bytes() == read_direct(disk) == expected
            assert mapped[:] == expected
        os.close(fd)
    assert qemu.content(tmp_path / "vm.qed") == expected


@pytest.mark.parametrize("way", ["cached", "growable_file"])
def test_a_smaller_backup_is_restored(way: str, tmp_path: Path) -> None:
    """A smaller backup is restored, also by cp, which truncates to the backup's size at the end."""
    backup = tmp_path / "backup.raw"
    with backup.open("wb") as file:
        file.write(b"data" * 1000)
        file.truncate(2 << 20)
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        for name, command in COMMANDS.items():
            with disk.open("r+b") as file:
                file.write(OLD * DISK_BYTES)
            assert run(command, backup, disk) == 0, name
            assert disk.stat().st_size == DISK_BYTES
            assert read_direct(disk) == backup.read_bytes() + bytes(DISK_BYTES - (2 << 20)), name


@pytest.mark.parametrize("way", ["cached", "file"])
def test_the_size_is_restored_without_a_request(way: str, tmp_path: Path) -> None:
    """The server restores the size itself: accesses to a memory map do not ask for it."""
    with mount_full(tmp_path, way, "truncate=zero") as disk:
        fd = os.open(disk, os.O_RDWR)
        with mmap.mmap(fd, DISK_BYTES) as mapped:
            mapped[0] = 1
            os.ftruncate(fd, 0)
            # The kernel's write into the map is checked like a load, but fails with an
            # error where a load would end this process.
            source = os.open(tmp_path / "vm.qed", os.O_RDONLY)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with suppress(OSError):
                    os.preadv(source, [memoryview(mapped)[:1]], 0)
                    break
                os.sched_yield()
            os.close(source)
            assert mapped[DISK_BYTES - 1] == 0
        os.close(fd)


def test_a_truncation_that_fails_is_not_hidden_by_the_cache(tmp_path: Path) -> None:
    """A truncation that fails halfway is reported, and the part that was zeroed is visible."""
    image = qemu.create(tmp_path / "vm.qed", DISK_BYTES, cluster_size=4096, table_size=2)
    qemu.io(image, f"write -P 0xff 0 {DISK_BYTES}")
    with image.open("r+b") as file:
        file.seek(header_of(image.read_bytes()).l1_table_offset + 8)
        file.seek(int.from_bytes(file.read(8), "little"))
        file.write((1 << 40).to_bytes(8, "little"))
    with front(image, "-o", "truncate=zero", tmp_path / "mnt") as mount:
        fd = os.open(mount.mountpoint / "vm.raw", os.O_RDWR)
        good = (0, 1 << 20)
        for at in good:
            assert os.pread(fd, 512, at) == OLD * 512
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.ftruncate(fd, 0)
        assert caught.value.errno == errno.EIO
        deadline, seen = time.monotonic() + 60, [OLD]
        while any(map(any, seen)) and time.monotonic() < deadline:
            seen = [os.pread(fd, 512, at) for at in good]
        os.close(fd)
        mount.process.terminate()
        assert mount.finish()[0] == 0
    assert seen == [bytes(512)] * 2, "zeros are visible before the answer, or shortly after it"


@pytest.mark.parametrize(
    ("mode", "way"),
    [
        *(("refuse", way) for way in ("cached", "growable")),
        *(("zero", way) for way in ("cached", "direct_io", "growable", "growable_file")),
    ],
)
def test_random_operations_match_a_model(mode: str, way: str, tmp_path: Path) -> None:
    """Random writes, stores, reads and truncations always match the model."""
    chance = random.Random(f"{mode} {way}")
    model = bytearray(OLD * DISK_BYTES)
    with mount_full(tmp_path, way, f"truncate={mode}") as disk:
        fd = os.open(disk, os.O_RDWR)
        for _ in range(60):
            start = chance.randrange(DISK_BYTES - 20_000)
            length = chance.choice([1, 512, PAGE_BYTES, 20_000])
            what = chance.choice(["write", "write", "store", "truncate", "resize", "read"])
            data = chance.randbytes(length)
            if what == "write":
                assert os.pwrite(fd, data, start) == length
                model[start : start + length] = data
            elif what == "store" and way != "direct_io":
                with mmap.mmap(fd, DISK_BYTES) as pages:
                    pages[start : start + length] = data
                model[start : start + length] = data
            elif what == "truncate":
                truncate = chance.choice(list(WAYS.values()))
                if mode == "zero":
                    truncate(disk, fd)
                    model = bytearray(len(model))
                else:
                    with pytest.raises(PermissionError):
                        truncate(disk, fd)
            elif what == "resize":
                sizes = [512, start, len(model) - 512, len(model), len(model) + 5120]
                size = chance.choice(sizes)
                with suppress(PermissionError):
                    chance.choice([os.truncate, os.ftruncate])(fd, size)
                    if size < len(model):
                        assert mode == "zero"
                        model[size:] = bytes(len(model) - size)
                    elif size > len(model):
                        assert "growable" in way
                        model.extend(bytes(size - len(model)))
            assert os.fstat(fd).st_size == disk.stat().st_size == len(model)
            assert os.pread(fd, length, start) == model[start : start + length]
        os.close(fd)
        assert disk.read_bytes() == model
    assert qemu.content(tmp_path / "vm.qed") == model


def test_a_read_only_disk_refuses_truncation(tmp_path: Path) -> None:
    """Truncations of a read-only disk fail with EROFS and change nothing."""
    with mount_full(tmp_path, "cached", "ro") as disk:
        for name, truncate in WAYS.items():
            if name != "by handle":
                with pytest.raises(OSError) as caught:  # noqa: PT011
                    truncate(disk, -1)
                assert caught.value.errno == errno.EROFS
        assert disk.read_bytes() == OLD * DISK_BYTES
