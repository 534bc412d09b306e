"""Write-behind: written data leaves the page cache, and write errors are reported."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError
from qedfuse.hostio import writebehind
from qedfuse.hostio.writebehind import WriteBehind
from tests.support.devices import file_system, loop_device

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def cached(fd: int, offset: int) -> bool:
    """Return whether the page at an offset is in the page cache, without loading it."""
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False


def test_only_the_last_writes_stay_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last writes are in the page cache, and all data is in the file."""
    monkeypatch.setattr(writebehind, "_MAX_IN_FLIGHT_BYTES", 4 * MIB)
    image = tmp_path / "host.img"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    (tmp_path / "host").mkdir()
    with loop_device(image) as device, file_system(device, tmp_path / "host") as host:
        fd = os.open(host / "file", os.O_RDWR | os.O_CREAT)
        try:
            behind = WriteBehind(fd, "file")
            for number in range(16):
                os.pwrite(fd, bytes([number + 1]) * MIB, number * MIB)
                behind.wrote(number * MIB, MIB)
            assert [cached(fd, number * MIB) for number in range(16)] == [False] * 12 + [True] * 4
            for number in range(16):
                assert os.pread(fd, MIB, number * MIB) == bytes([number + 1]) * MIB
        finally:
            os.close(fd)


def test_data_for_a_slow_disk_stays_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that does not wait keeps data for a slow disk in the page cache."""
    monkeypatch.setattr(writebehind, "_MAX_IN_FLIGHT_BYTES", 4 * MIB)
    monkeypatch.setattr(writebehind, "_MIN_BYTES_PER_SECOND", 1 << 60)
    image = tmp_path / "host.img"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with loop_device(image) as device, file_system(device, tmp_path / "host") as host:
        fd = os.open(host / "file", os.O_RDWR | os.O_CREAT)
        try:
            behind = WriteBehind(fd, "file", waits=False)
            write_much(fd, behind)
            assert all(cached(fd, number * MIB) for number in range(1, 32))
            assert os.pread(fd, 32 * MIB, 0) == b"x" * (32 * MIB)
        finally:
            os.close(fd)


def write_much(fd: int, behind: WriteBehind) -> None:
    """Write more than may be in flight."""
    for number in range(32):
        os.pwrite(fd, b"x" * MIB, number * MIB)
        behind.wrote(number * MIB, MIB)


def test_a_write_back_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write-back error is raised at the next write: the kernel reports it only once."""
    monkeypatch.setattr(writebehind, "_MAX_IN_FLIGHT_BYTES", 2 * MIB)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", small], check=True)
    try:
        with (small / "disk").open("wb") as file:
            file.truncate(64 * MIB)
        with loop_device(small / "disk") as device:
            fd = os.open(device, os.O_RDWR)
            try:
                behind = WriteBehind(fd, "disk")
                with pytest.raises(HostError, match=r"^disk: write: "):
                    write_much(fd, behind)
            finally:
                os.close(fd)
    finally:
        subprocess.run(["umount", small], check=True)


def test_pipes_are_left_alone() -> None:
    """Pipes are ignored: they have no page cache."""
    reader, writer = os.pipe()
    try:
        WriteBehind(writer, "pipe").wrote(0, 4096)
    finally:
        os.close(reader)
        os.close(writer)
