"""A host file that does not answer delays only its own disk."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from tests.support import qemu
from tests.support.mounted import TIMEOUT, front, qedfuse
from tests.support.stallingfs import StallingFile, stalling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK_BYTES: Final = 16 << 20
BLOCK: Final = 4096
MANY: Final = 120
"""More requests than pyfuse3 has tasks by default (99), and than one file may have threads (32)."""


@pytest.fixture(params=["native", "threads"])
def slow_and_fast(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StallingFile, int, int]]:
    """Mount a disk on a file that can hang, and another one; yield the file and two descriptors."""
    if request.param == "threads":
        monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")
    for name in ("slow", "fast"):
        image = tmp_path / f"{name}.qed"
        qemu.create(image, DISK_BYTES)
        qemu.io(image, f"write -P {ord(name[0])} 0 {DISK_BYTES}")
    flags = os.O_RDWR | os.O_DIRECT
    with (
        stalling(tmp_path / "slow.qed", tmp_path / "host") as file,
        front(file.path, tmp_path / "fast.qed", tmp_path / "mnt") as mount,
    ):
        slow = os.open(mount.mountpoint / "slow.raw", flags)
        fast = os.open(mount.mountpoint / "fast.raw", flags)
        try:
            yield file, slow, fast
        finally:
            file.release()
            os.close(slow)
            os.close(fast)
        assert qedfuse("umount", mount.mountpoint).returncode == 0
    for name in ("slow", "fast"):
        assert qemu.check(tmp_path / f"{name}.qed").code == 0


def read(fd: int, offset: int) -> bytes:
    """Read a block."""
    with mmap.mmap(-1, BLOCK) as buffer:
        assert os.preadv(fd, [buffer], offset) == BLOCK
        return buffer[:BLOCK]


def write(fd: int, offset: int, value: bytes) -> int:
    """Fill a block with one byte."""
    with mmap.mmap(-1, BLOCK) as buffer:
        buffer[:] = value * BLOCK
        return os.pwritev(fd, [buffer], offset)


def sync(fd: int) -> bool:
    """Make everything durable."""
    os.fsync(fd)
    return True


def use(fd: int, mount_image: Path) -> None:
    """Read from memory and from the disk, write in place, make durable, and discard."""
    for _ in range(20):
        assert write(fd, 0, b"w") == BLOCK
        os.fsync(fd)
        assert read(fd, 0) == b"w" * BLOCK
    assert read(fd, 1 << 20) == b"f" * BLOCK
    image = os.open(mount_image, os.O_RDONLY)
    os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(image)
    assert read(fd, 2 << 20) == b"f" * BLOCK


SLOW: Final = {
    "read": lambda fd, number: read(fd, number * BLOCK) == b"s" * BLOCK,
    "write": lambda fd, number: write(fd, number * BLOCK, b"s") == BLOCK,
    "fsync": lambda fd, _number: sync(fd),
}


@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("kind", ["read", "write", "fsync"])
def test_a_host_file_that_hangs_delays_only_its_own_disk(
    kind: str, count: int, slow_and_fast: tuple[StallingFile, int, int], tmp_path: Path
) -> None:
    """While requests of one disk hang, another one of the same mount reads, writes and flushes."""
    file, slow, fast = slow_and_fast
    # Everything was fast up to now, so that the server might expect the same of the next calls.
    for number in range(20):
        assert write(slow, number * BLOCK, b"s") == BLOCK
        os.fsync(slow)
    if kind == "fsync":
        write(slow, 0, b"s")
    action: Callable[[int, int], bool] = SLOW[kind]
    with ThreadPoolExecutor(count + 1) as pool:
        file.stall()
        waiting = [pool.submit(action, slow, number) for number in range(count)]
        try:
            file.wait_for(kind)
            pool.submit(use, fast, tmp_path / "fast.qed").result(timeout=TIMEOUT)
            assert not any(one.done() for one in waiting)
        finally:
            file.release()
        assert all(one.result(timeout=TIMEOUT) for one in waiting)
