"""A host file system that runs full underneath a mount, and gets room again (S5)."""

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
from tests.support.mounted import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")

ROOM: Final = 24 << 20
"""Length of the host's file system, in bytes."""

BALLAST: Final = 8 << 20
DISK: Final = 40 << 20
BLOCK: Final = 64 << 10
FULL: Final = (errno.ENOSPC, errno.EIO)
"""A loop device has one word for all that goes wrong underneath it."""


@contextmanager
def host(kind: str, tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system."""
    place = tmp_path / "host"
    place.mkdir()
    command: list[str | Path]
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place]
    else:
        device = tmp_path / "device"
        with device.open("wb") as file:
            file.truncate(ROOM)
        subprocess.run(["mkfs.ext4", "-q", "-m0", device], check=True)
        command = ["mount", "-o", "loop", device, place]
    subprocess.run(command, check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


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
    """Writes blocks until there is no room, and knows what it has written."""

    def __init__(self, fd: int) -> None:
        """Use a disk of zeros."""
        self._fd = fd
        self._buffer = mmap.mmap(-1, BLOCK)
        self.content = bytearray(DISK)
        self.next = 0

    def write(self, number: int, seed: int) -> None:
        """Write one block."""
        self._buffer[:] = data = random.Random(seed).randbytes(BLOCK)
        assert os.pwrite(self._fd, self._buffer, number * BLOCK) == BLOCK
        self.content[number * BLOCK : (number + 1) * BLOCK] = data

    def fill(self, upto: int) -> None:
        """Write blocks that were never written, to the end or until the host is full."""
        while self.next < upto:
            self.write(self.next, self.next)
            self.next += 1

    def check(self) -> None:
        """Read everything back that was written."""
        for number in range(self.next):
            assert os.preadv(self._fd, [self._buffer], number * BLOCK) == BLOCK
            expected = self.content[number * BLOCK : (number + 1) * BLOCK]
            assert self._buffer[:] == bytes(expected), number


@pytest.mark.parametrize("through", ["file", "loop"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_host_goes_on_when_there_is_room(kind: str, through: str, tmp_path: Path) -> None:
    """The guest sees that it is full, reads and overwrites go on, and room helps."""
    with host(kind, tmp_path) as place:
        image = qemu.create(place / "disk.qed", DISK)
        ballast = place / "ballast"
        ballast.write_bytes(b"x" * BALLAST)
        with (
            mounted(image, tmp_path / "mnt", "-o", "commit=1") as directory,
            guest(through, directory / "disk.raw") as fd,
        ):
            user = Guest(fd)
            with pytest.raises(OSError, match=r"No space|Input/output") as caught:
                user.fill(DISK // BLOCK)
            assert caught.value.errno in FULL
            if through == "file":
                assert caught.value.errno == errno.ENOSPC
            written = user.next
            assert BALLAST <= written * BLOCK < ROOM - BALLAST, "the room there was is used"
            user.check()
            for number in range(0, written, 7):
                user.write(number, 1000 + number)
            user.check()
            # Again and again: what a failed write has taken must come back.
            for _ in range(20):
                with pytest.raises(OSError, match=r"No space|Input/output"):
                    user.fill(DISK // BLOCK)
            os.fsync(fd)
            ballast.unlink()
            if kind == "ext4":
                # Blocks of a deleted file are free when the journal says so.  The file system
                # alone: sync(2) waits for all others of the machine too, busy ones as well.
                subprocess.run(["sync", "--file-system", place], check=True)
            user.fill(written + BALLAST // BLOCK // 2)
            user.check()
            os.fsync(fd)
        file = image.read_bytes()
        assert qemu.check(image).code == 0, qemu.check(image).text
    assert inspect_image(file).errors == ()
    found = guest_bytes(file)
    end = user.next * BLOCK
    assert found[:end] == bytes(user.content[:end])
    assert not any(found[end + 2 * BLOCK :]), "what was refused is not there"


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_unmount_of_a_full_host(kind: str, tmp_path: Path) -> None:
    """Everything that was accepted finds room: the unmount ends well on a full host too."""
    with host(kind, tmp_path) as place:
        image = qemu.create(place / "disk.qed", DISK, cluster_size=4096, table_size=2)
        with (
            mounted(image, tmp_path / "mnt") as directory,
            guest("file", directory / "disk.raw") as fd,
        ):
            user = Guest(fd)
            with pytest.raises(OSError, match="No space"):
                user.fill(DISK // BLOCK)
            assert user.next * BLOCK > ROOM // 2
        assert qemu.check(image).errors == 0
        # (QEMU's own count of leaks is off by one with clusters this small.)
        assert inspect_image(image.read_bytes()) == Inspection(())
        found = guest_bytes(image.read_bytes())
    end = user.next * BLOCK
    assert found[:end] == bytes(user.content[:end])


def test_space_that_the_host_does_not_have(tmp_path: Path) -> None:
    """For fallocate -l: it fails, the size that is shown is the disk's, and the disk goes on."""
    with host("tmpfs", tmp_path) as place:
        image = qemu.create(place / "disk.qed", DISK // 4)
        with mounted(image, tmp_path / "mnt", "-o", "growable") as directory:
            disk = directory / "disk.raw"
            for _ in range(2):
                done = subprocess.run(
                    ["fallocate", "-l", str(DISK), disk], capture_output=True, check=False
                )
                assert done.returncode != 0
                assert os.strerror(errno.ENOSPC).encode() in done.stderr
            assert header_of(image.read_bytes()[:64]).image_size == DISK
            deadline = time.monotonic() + 10
            while disk.stat().st_size != DISK and time.monotonic() < deadline:
                os.sched_yield()
            assert disk.stat().st_size == DISK
            with disk.open("r+b") as file:
                file.write(b"on")
                os.fsync(file.fileno())
            assert disk.read_bytes()[:3] == b"on\0"
        assert qemu.check(image).errors == 0
