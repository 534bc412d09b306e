"""Laundering: the kernel writes dirty pages back before a hole is reported, without deadlock."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.extensions import needs_extensions
from tests.support.mounted import TIMEOUT, front, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20

WRITER: Final = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for start in range(0, 1 << 30, 64 << 20):
    for at in range(start, start + (64 << 20), 1 << 20):
        os.pwrite(fd, os.urandom(1 << 20), at)
    print("seeking", flush=True)
    assert os.lseek(fd, start, os.SEEK_HOLE) == start + (64 << 20)
"""
"""Leaves 64 MiB of dirty pages, so that a lseek(2) takes long enough to be interrupted."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image of 1 GiB."""
    return qemu.create(tmp_path / "vm.qed", 1 << 30)


@contextmanager
def seeking(disk: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the writer; it is in its second lseek(2) when the block begins."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, disk],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with writer:
        assert writer.stdout is not None
        for _ in range(2):
            assert writer.stdout.readline() == "seeking\n"
        try:
            yield writer
        finally:
            writer.kill()


def launderers(pid: int) -> list[int]:
    """List the children of a process that are connected to a mount."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if f"\nPPid:\t{pid}\n" in text and any(
            descriptor.readlink() == Path("/dev/fuse") for descriptor in path.parent.glob("fd/*")
        ):
            found.append(int(path.parent.name))
    return found


def wait_until_blocked(pid: int) -> int:
    """Return the launderer of a process once one of its threads waits uninterruptibly."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for launderer in launderers(pid):
            for thread in Path(f"/proc/{launderer}/task").iterdir():
                if "\nState:\tD" in (thread / "status").read_text():
                    return launderer
    msg = "no launderer thread waits for the kernel"
    raise AssertionError(msg)


@needs_extensions
def test_a_server_killed_during_laundering_ends(image: Path, tmp_path: Path) -> None:
    """SIGKILL during laundering ends the server, and programs that wait for it get an error."""
    with front(image, tmp_path / "mnt") as mount, seeking(mount.mountpoint / "vm.raw") as writer:
        wait_until_blocked(mount.process.pid)
        mount.signal(signal.SIGKILL)
        assert mount.finish()[0] == -signal.SIGKILL
        assert writer.wait(TIMEOUT) == 1
        with pytest.raises(OSError) as caught:  # noqa: PT011
            (mount.mountpoint / "vm.raw").open("rb")
        assert caught.value.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    assert qemu.check(image).errors == 0


@needs_extensions
def test_a_second_signal_ends_a_mount_during_laundering(image: Path, tmp_path: Path) -> None:
    """A second SIGTERM during laundering ends the mount with code 0 and leaves no launderer."""
    with front(image, tmp_path / "mnt") as mount, seeking(mount.mountpoint / "vm.raw") as writer:
        launderer = wait_until_blocked(mount.process.pid)
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        wait_until_blocked(mount.process.pid)
        mount.signal(signal.SIGTERM)
        code, _log = mount.finish()
        assert code == 0
        assert writer.wait(TIMEOUT) == 1
        assert not Path(f"/proc/{launderer}").exists()
    assert qemu.check(image).errors == 0


@needs_extensions
def test_without_the_launderer_everything_is_data(image: Path, tmp_path: Path) -> None:
    """Without the launderer no hole is reported while a program may write; one line logs it."""
    with front(image, tmp_path / "mnt") as mount:
        path = mount.mountpoint / "vm.raw"
        with path.open("r+b", buffering=0) as file:
            file.write(b"x" * 4096)
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
            (launderer,) = launderers(mount.process.pid)
            os.kill(launderer, signal.SIGKILL)
            assert os.lseek(file.fileno(), 8 * MIB, os.SEEK_DATA) == 8 * MIB
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 1 << 30
        assert "the launderer (a helper process) has failed" in mount.read_line()
        with path.open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536, (
                "no descriptor is open for writing"
            )
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


@needs_extensions
def test_a_read_only_mount_has_no_launderer(image: Path, tmp_path: Path) -> None:
    """A read-only mount needs no laundering and starts no launderer."""
    with front("-r", image, tmp_path / "mnt") as mount:
        with (mount.mountpoint / "vm.raw").open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0
        assert launderers(mount.process.pid) == []
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


@needs_extensions
@pytest.mark.parametrize("options", [(), ("-o", "truncate=zero")], ids=["", "truncate=zero"])
@pytest.mark.parametrize("mountpoint", ["directory", "file"])
def test_stores_into_a_memory_map_are_data(
    mountpoint: str, options: tuple[str, ...], image: Path, tmp_path: Path
) -> None:
    """Stores into a shared memory map are reported as data, also without the write-back cache."""
    target = tmp_path / "mnt"
    if mountpoint == "file":
        target.touch()
    with mounted(image, target, *options) as mounted_at:
        disk = mounted_at if mountpoint == "file" else mounted_at / "vm.raw"
        with disk.open("r+b") as file, mmap.mmap(file.fileno(), 4 * MIB) as pages:
            pages[2 * MIB : 2 * MIB + 5] = b"hello"
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 2 * MIB
            pages[MIB] = 1
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == MIB


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Path]:
    """Mount a growable image of 1 MiB; give the disk."""
    image = qemu.create(tmp_path / "grow.qed", MIB)
    with mounted(image, tmp_path / "mnt", "-o", "growable") as mountpoint:
        yield mountpoint / "grow.raw"
    assert qemu.check(image).errors == 0


@needs_extensions
def test_dirty_pages_past_the_servers_end_are_data(growing: Path, tmp_path: Path) -> None:
    """Unsynced data past the end that the server knows is reported, and copies contain it."""
    with growing.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, b"G" * 512, 2 * MIB - 512)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB - 65536
        os.pwrite(fd, b"H" * 512, 3 * MIB)
        assert os.lseek(fd, 2 * MIB, os.SEEK_DATA) == 3 * MIB, "from past the server's end"
        os.pwrite(fd, b"I" * 512, 5 * MIB)
        assert os.lseek(fd, 4 * MIB, os.SEEK_HOLE) == 4 * MIB, "a hole past the server's end"
        os.pwrite(fd, b"J" * 65536, 6 * MIB)
        os.pwrite(fd, b"K" * 65536, 6 * MIB + 65536)
        assert os.lseek(fd, 6 * MIB, os.SEEK_HOLE) == 6 * MIB + 2 * 65536, "data as well"
        with pytest.raises(OSError) as caught:  # noqa: PT011
            os.lseek(fd, 64 * MIB, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
        os.pwrite(fd, b"L" * 512, 8 * MIB)
        copy = tmp_path / "copy"
        subprocess.run(["cp", "--sparse=auto", growing, copy], check=True)
        assert copy.read_bytes() == growing.read_bytes()
        assert copy.stat().st_blocks * 512 < 2 * MIB


def test_the_hole_of_a_grown_full_disk_is_at_its_new_end(growing: Path) -> None:
    """Data that goes on past the server's end is reported up to the end that the kernel knows."""
    with growing.open("r+b", buffering=0) as file:
        file.write(b"a" * MIB)
        os.fsync(file.fileno())
        file.write(b"b" * MIB)
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 2 * MIB


@needs_extensions
def test_without_the_launderer_growth_is_data_or_an_error(tmp_path: Path) -> None:
    """Without the launderer, lseek(2) past the server's end reports data or EIO, never a hole."""
    image = qemu.create(tmp_path / "grow.qed", MIB)
    with front(image, "-o", "growable", tmp_path / "mnt") as mount:
        path = mount.mountpoint / "grow.raw"
        with path.open("r+b", buffering=0) as file:
            file.write(b"x")
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
            (launderer,) = launderers(mount.process.pid)
            os.kill(launderer, signal.SIGKILL)
            os.pwrite(file.fileno(), b"G" * 512, 2 * MIB)
            assert os.lseek(file.fileno(), MIB, os.SEEK_DATA) == MIB
            with pytest.raises(OSError) as caught:  # noqa: PT011
                os.lseek(file.fileno(), MIB, os.SEEK_HOLE)
            assert caught.value.errno == errno.EIO
        assert "the launderer (a helper process) has failed" in mount.read_line()
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
