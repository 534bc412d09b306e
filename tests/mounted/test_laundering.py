"""Holes are told only of what the kernel has written back, and nobody waits for that in vain."""

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
"""Makes the kernel write back 64 MiB before it is told where they end."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image of 1 GiB."""
    return qemu.create(tmp_path / "vm.qed", 1 << 30)


@contextmanager
def seeking(disk: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the writer; it is in its second seek when the block begins."""
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


def helpers(pid: int) -> list[int]:
    """List the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if f"\nPPid:\t{pid}\n" in text:
            found.append(int(path.parent.name))
    return found


def waiting(pid: int) -> int:
    """Return when the helper of a process waits for the kernel, and nothing can end it."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for helper in helpers(pid):
            for thread in Path(f"/proc/{helper}/task").iterdir():
                if "\nState:\tD" in (thread / "status").read_text():
                    return helper
    msg = "the kernel has been asked for nothing"
    raise AssertionError(msg)


def test_a_killed_server_is_gone(image: Path, tmp_path: Path) -> None:
    """Also while the kernel writes back to it; who waits gets an error."""
    with front(image, tmp_path / "mnt") as mount, seeking(mount.mountpoint / "vm.raw") as writer:
        waiting(mount.process.pid)
        mount.signal(signal.SIGKILL)
        assert mount.finish()[0] == -signal.SIGKILL
        assert writer.wait(TIMEOUT) == 1
        with pytest.raises(OSError) as caught:  # noqa: PT011
            (mount.mountpoint / "vm.raw").open("rb")
        assert caught.value.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    assert qemu.check(image).errors == 0


def test_a_second_signal_ends_it_all_the_same(image: Path, tmp_path: Path) -> None:
    """In order, and without a process left behind."""
    with front(image, tmp_path / "mnt") as mount, seeking(mount.mountpoint / "vm.raw") as writer:
        helper = waiting(mount.process.pid)
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        waiting(mount.process.pid)
        mount.signal(signal.SIGTERM)
        code, _log = mount.finish()
        assert code == 0
        assert writer.wait(TIMEOUT) == 1
        assert not Path(f"/proc/{helper}").exists()
    assert qemu.check(image).errors == 0


def test_without_the_helper_everything_is_data(image: Path, tmp_path: Path) -> None:
    """Nothing is called a hole that might be none; a copy is complete and larger."""
    with front(image, tmp_path / "mnt") as mount:
        path = mount.mountpoint / "vm.raw"
        with path.open("r+b", buffering=0) as file:
            file.write(b"x" * 4096)
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
            (helper,) = helpers(mount.process.pid)
            os.kill(helper, signal.SIGKILL)
            assert os.lseek(file.fileno(), 8 * MIB, os.SEEK_DATA) == 8 * MIB
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 1 << 30
        assert "a helper process has failed" in mount.read_line()
        with path.open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536, "nobody writes any more"
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


def test_a_mount_that_nobody_writes_to_has_no_helper(image: Path, tmp_path: Path) -> None:
    """What nobody writes to, the kernel has nothing of."""
    with front("-r", image, tmp_path / "mnt") as mount:
        with (mount.mountpoint / "vm.raw").open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0
        assert helpers(mount.process.pid) == []
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


def test_pages_that_are_mapped(image: Path, tmp_path: Path) -> None:
    """What is written through a shared mapping is told as well."""
    with (
        mounted(image, tmp_path / "mnt") as place,
        (place / "vm.raw").open("r+b") as file,
        mmap.mmap(file.fileno(), 4 * MIB) as pages,
    ):
        pages[2 * MIB : 2 * MIB + 5] = b"hello"
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 2 * MIB
        pages[MIB] = 1
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == MIB


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Path]:
    """Mount an image of 1 MiB that may grow; give the disk."""
    image = qemu.create(tmp_path / "grow.qed", MIB)
    with mounted(image, tmp_path / "mnt", "-o", "growable") as place:
        yield place / "grow.raw"
    assert qemu.check(image).errors == 0


def test_data_past_the_end_that_only_the_kernel_knows(growing: Path, tmp_path: Path) -> None:
    """Holes are asked of the kernel up to the end that it knows, also from there on."""
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


def test_a_full_disk_that_grows_has_its_hole_at_its_new_end(growing: Path) -> None:
    """Where the data reaches the server's end, it may go on behind that."""
    with growing.open("r+b", buffering=0) as file:
        file.write(b"a" * MIB)
        os.fsync(file.fileno())
        file.write(b"b" * MIB)
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 2 * MIB


def test_without_the_helper_growth_is_data_or_an_error(tmp_path: Path) -> None:
    """A copy is complete or fails."""
    image = qemu.create(tmp_path / "grow.qed", MIB)
    with front(image, "-o", "growable", tmp_path / "mnt") as mount:
        path = mount.mountpoint / "grow.raw"
        with path.open("r+b", buffering=0) as file:
            file.write(b"x")
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
            (helper,) = helpers(mount.process.pid)
            os.kill(helper, signal.SIGKILL)
            os.pwrite(file.fileno(), b"G" * 512, 2 * MIB)
            assert os.lseek(file.fileno(), MIB, os.SEEK_DATA) == MIB
            with pytest.raises(OSError) as caught:  # noqa: PT011
                os.lseek(file.fileno(), MIB, os.SEEK_HOLE)
            assert caught.value.errno == errno.EIO
        assert "a helper process has failed" in mount.read_line()
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
