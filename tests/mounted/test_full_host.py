"""A host file system that gets full underneath a mount, and gets free space again (S5)."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.disks import Inspection, guest_bytes, header_of, inspect_image
from tests.support.extensions import needs_extensions
from tests.support.mounted import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")

HOST_BYTES: Final = 24 << 20
"""Size of the host's file system."""

BALLAST_BYTES: Final = 8 << 20
DISK_BYTES: Final = 40 << 20
BLOCK_BYTES: Final = 64 << 10
FULL: Final = (errno.ENOSPC, errno.EIO)
"""Errors of a full host: a loop device reports each error underneath it as EIO."""


@contextmanager
def host(kind: str, tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system."""
    host_directory = tmp_path / "host"
    host_directory.mkdir()
    command: list[str | Path]
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={HOST_BYTES}", "tmpfs", host_directory]
    else:
        device = tmp_path / "device"
        with device.open("wb") as file:
            file.truncate(HOST_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-m0", device], check=True)
        command = ["mount", "-o", "loop", device, host_directory]
    subprocess.run(command, check=True)
    try:
        yield host_directory
    finally:
        subprocess.run(["umount", host_directory], check=True)


@contextmanager
def guest(kind: str, disk: Path) -> Iterator[int]:
    """Open a disk as a guest does: the file itself, or a loop device on it."""
    path: str = str(disk)
    if kind == "loop":
        command = ["losetup", "--find", "--show", "--direct-io=on", path]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        if kind == "loop":
            subprocess.run(["losetup", "--detach", path], check=True)


class Guest:
    """Writes blocks until the host is full, and keeps what it has written."""

    def __init__(self, fd: int) -> None:
        """Use a disk of zeros."""
        self._fd = fd
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)
        self.content = bytearray(DISK_BYTES)
        self.next = 0

    def write(self, number: int, seed: int) -> None:
        """Write one block."""
        self._buffer[:] = data = random.Random(seed).randbytes(BLOCK_BYTES)
        assert os.pwrite(self._fd, self._buffer, number * BLOCK_BYTES) == BLOCK_BYTES
        self.content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = data

    def fill(self, upto: int) -> None:
        """Write blocks that were never written, up to block ``upto`` or until the host is full."""
        while self.next < upto:
            self.write(self.next, self.next)
            self.next += 1

    def check(self) -> None:
        """Read everything back and compare it."""
        for number in range(self.next):
            assert os.preadv(self._fd, [self._buffer], number * BLOCK_BYTES) == BLOCK_BYTES
            expected = self.content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            assert self._buffer[:] == bytes(expected), number


@pytest.mark.parametrize("through", ["file", "loop"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_recovers_when_the_host_has_space_again(
    kind: str, through: str, tmp_path: Path
) -> None:
    """On a full host new writes fail, reads and overwrites work, and freed space helps."""
    with host(kind, tmp_path) as host_directory:
        image = qemu.create(host_directory / "disk.qed", DISK_BYTES)
        ballast = host_directory / "ballast"
        ballast.write_bytes(b"x" * BALLAST_BYTES)
        with (
            mounted(image, tmp_path / "mnt", "-o", "commit=1") as directory,
            guest(through, directory / "disk.raw") as fd,
        ):
            user = Guest(fd)
            with pytest.raises(OSError, match=r"No space|Input/output") as caught:
                user.fill(DISK_BYTES // BLOCK_BYTES)
            assert caught.value.errno in FULL
            if through == "file":
                assert caught.value.errno == errno.ENOSPC
            written = user.next
            assert BALLAST_BYTES <= written * BLOCK_BYTES < HOST_BYTES - BALLAST_BYTES, (
                "the free space was used"
            )
            user.check()
            for number in range(0, written, 7):
                user.write(number, 1000 + number)
            user.check()
            # Repeated: a failed write must free the clusters that it took.
            for _ in range(20):
                with pytest.raises(OSError, match=r"No space|Input/output"):
                    user.fill(DISK_BYTES // BLOCK_BYTES)
            os.fsync(fd)
            ballast.unlink()
            if kind == "ext4":
                # Blocks of a deleted file are free when the journal says so.  The file system
                # alone: sync(2) waits for all others of the machine too, busy ones as well.
                subprocess.run(["sync", "--file-system", host_directory], check=True)
            user.fill(written + BALLAST_BYTES // BLOCK_BYTES // 2)
            user.check()
            os.fsync(fd)
        file = image.read_bytes()
        assert qemu.check(image).code == 0, qemu.check(image).text
    assert inspect_image(file).errors == ()
    found = guest_bytes(file)
    end = user.next * BLOCK_BYTES
    assert found[:end] == bytes(user.content[:end])
    assert not any(found[end + 2 * BLOCK_BYTES :]), "what was refused is not there"


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_unmount_of_a_full_host_keeps_all_accepted_data(kind: str, tmp_path: Path) -> None:
    """On a full host the unmount succeeds, and everything that was accepted is in the image."""
    with host(kind, tmp_path) as host_directory:
        image = qemu.create(
            host_directory / "disk.qed", DISK_BYTES, cluster_size=4096, table_size=2
        )
        with (
            mounted(image, tmp_path / "mnt") as directory,
            guest("file", directory / "disk.raw") as fd,
        ):
            user = Guest(fd)
            with pytest.raises(OSError, match="No space"):
                user.fill(DISK_BYTES // BLOCK_BYTES)
            assert user.next * BLOCK_BYTES > HOST_BYTES // 2
        assert qemu.check(image).errors == 0
        # (QEMU's own count of leaks is off by one with clusters this small.)
        assert inspect_image(image.read_bytes()) == Inspection(())
        found = guest_bytes(image.read_bytes())
    end = user.next * BLOCK_BYTES
    assert found[:end] == bytes(user.content[:end])


@needs_extensions
def test_fallocate_of_more_than_the_host_has(tmp_path: Path) -> None:
    """An allocation of more than the host has fails with ENOSPC; the disk stays usable."""
    with host("tmpfs", tmp_path) as host_directory:
        image = qemu.create(host_directory / "disk.qed", DISK_BYTES // 4)
        with mounted(image, tmp_path / "mnt", "-o", "growable") as directory:
            disk = directory / "disk.raw"
            for _ in range(2):
                done = subprocess.run(
                    ["fallocate", "-l", str(DISK_BYTES), disk], capture_output=True, check=False
                )
                assert done.returncode != 0
                assert os.strerror(errno.ENOSPC).encode() in done.stderr
            assert header_of(image.read_bytes()[:64]).image_size == DISK_BYTES
            deadline = time.monotonic() + 60
            while disk.stat().st_size != DISK_BYTES and time.monotonic() < deadline:
                os.sched_yield()
            assert disk.stat().st_size == DISK_BYTES
            with disk.open("r+b") as file:
                file.write(b"on")
                os.fsync(file.fileno())
            assert disk.read_bytes()[:3] == b"on\0"
        assert qemu.check(image).errors == 0
