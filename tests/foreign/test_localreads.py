"""Reads without QEMU: the right bytes of each format, without qemu-nbd, under locks of our own."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import pytest

from qedfuse.disk.lookup.foreignopening import open_foreign
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import ForeignError, HostError
from qedfuse.foreign import localreads, mapping
from qedfuse.foreign.foreignfile import ForeignFile
from qedfuse.foreign.localreads import LOOKUPS_BEFORE_MAP
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu
from tests.support.foreignchains import (
    DISK_BYTES,
    FORMATS,
    draw_chain,
    draw_disk,
    processes,
    servers,
)
from tests.support.mounted import front
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qedfuse.foreign.runmap import RunMap
    from qedfuse.hostio.hostfile import HostFile

_STEP: Final = 1 << 16
SERVER_ENDED: Final = "qemu-nbd: ended by SIGKILL; reads that need QEMU fail from now on"


def wait_for_map() -> None:
    """Wait until the map, which is being made, is complete."""
    for thread in threading.enumerate():
        if thread.name == "qedfuse map":
            thread.join(60)
            assert not thread.is_alive()


async def opened(path: Path, *, lock: bool = True, share: bool = False) -> HostFile:
    """Return the disk of an image after the reads that start the map; the map is complete."""
    options = OpenOptions(lock=lock, force_share=share, backing=BackingPolicy(mode="any"))
    driver = path.suffix.removeprefix(".")
    disk = await open_foreign(PosixFile.open(str(path)), driver, options)
    for _ in range(LOOKUPS_BEFORE_MAP):
        await disk.pread(0, 512)
    wait_for_map()
    return disk


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def kill_server(directory: Path) -> None:
    """Kill qemu-nbd and wait for its end, so that only reads without it succeed."""
    (found,) = servers(directory)
    pidfd = os.pidfd_open(found)
    os.kill(found, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


async def read_by(disk: HostFile, how: str, offset: int, length: int) -> bytes:
    """Read a range by one of the methods; some pages may not be in the page cache."""
    buffer = bytearray(length)
    if how == "pread":
        return bytes(await disk.pread(offset, length))
    if how == "read_blocking":
        assert disk.read_blocking(offset, memoryview(buffer)) == length
    elif not disk.try_read(offset, memoryview(buffer)):
        assert await disk.pread_into(offset, memoryview(buffer)) == length
    return bytes(buffer)


@pytest.mark.parametrize("image_format", [name for name in FORMATS if name != "vhdx"])
async def test_each_format_without_server(tmp_path: Path, image_format: str) -> None:
    """The data of an image is read without qemu-nbd, right in each format but VHDX."""
    path, raw = draw_disk(tmp_path, image_format)
    expected = raw.read_bytes()
    disk = await opened(path)
    try:
        kill_server(tmp_path)
        for how in ("pread", "read_blocking", "try_read"):
            for offset in range(0, len(expected), 700_001):
                length = min(900_000, len(expected) - offset)
                found = await read_by(disk, how, offset, length)
                assert found == expected[offset : offset + length]
    finally:
        disk.close()


@pytest.mark.parametrize("seed", range(20, 26))
async def test_random_chain(tmp_path: Path, seed: int) -> None:
    """A chain of mixed formats has the bytes that QEMU shows, partly read without QEMU."""
    chance = random.Random(seed)
    path, raw = draw_chain(tmp_path, chance, chance.choice(("qcow2", "qcow")))
    expected = raw.read_bytes()
    disk = await opened(path)
    try:
        for _ in range(60):
            offset = chance.randrange(len(expected))
            length = min(chance.choice((512, 4096, 300_000)), len(expected) - offset)
            how = chance.choice(("pread", "read_blocking", "try_read"))
            assert await read_by(disk, how, offset, length) == expected[offset : offset + length]
    finally:
        disk.close()


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """Give an image with data, then a compressed cluster, and a base with data after both."""
    base = qemu.create(tmp_path / "base.qcow2", DISK_BYTES, image_format="qcow2")
    qemu.io(base, "write -P 3 1M 1M", image_format="qcow2")
    path = qemu.create(
        tmp_path / "image.qcow2", image_format="qcow2", backing=base, backing_format="qcow2"
    )
    qemu.io(path, "write -P 7 0 128k", "write -c -P 8 128k 64k", image_format="qcow2")
    return path


@pytest.mark.expect_log(SERVER_ENDED)
async def test_compressed_cluster(compressed: Path) -> None:
    """A compressed cluster still needs QEMU, also as the middle of a read."""
    disk = await opened(compressed)
    try:
        assert await disk.pread(_STEP, 3 * _STEP) == b"".join(
            bytes([value]) * _STEP for value in (7, 8, 0)
        )
        kill_server(compressed.parent)
        assert await disk.pread(0, 2 * _STEP) == b"\7" * (2 * _STEP)
        with pytest.raises(ForeignError, match="ended by SIGKILL"):
            await disk.pread(_STEP, 3 * _STEP)
    finally:
        disk.close()


async def test_locks_outlast_server(compressed: Path) -> None:
    """When qemu-nbd has ended, no file of the chain can be opened for writing until the close."""
    disk = await opened(compressed)
    base = compressed.with_name("base.qcow2")
    try:
        kill_server(compressed.parent)
        assert await disk.pread(1 << 20, 4096) == b"\3" * 4096
        for path in (compressed, base):
            with pytest.raises(qemu.QemuError, match="lock"):
                qemu.io(path, "write 0 512", image_format="qcow2")
    finally:
        disk.close()
    qemu.io(base, "write 0 512", image_format="qcow2")


@pytest.mark.expect_log(SERVER_ENDED)
@pytest.mark.parametrize(("lock", "share"), [(False, False), (True, True)])
async def test_no_map_without_locks(compressed: Path, *, lock: bool, share: bool) -> None:
    """If another program may change the image, QEMU makes all reads."""
    disk = await opened(compressed, lock=lock, share=share)
    try:
        assert disk.page_source is None
        assert await disk.pread(0, 4096) == b"\7" * 4096
        kill_server(compressed.parent)
        with pytest.raises(HostError, match="qemu-nbd: ended by SIGKILL"):
            await disk.pread(0, 4096)
    finally:
        disk.close()


async def test_base_in_use(compressed: Path) -> None:
    """If the raw base of an image is locked by a writer, which QEMU permits, there is no map."""
    raw = compressed.with_name("raw.img")
    raw.write_bytes(b"\5" * _STEP)
    path = qemu.create(
        compressed.with_name("top.qcow2"), image_format="qcow2", backing=raw, backing_format="raw"
    )
    with qemu.hold(raw, image_format="raw"):
        disk = await opened(path)
    try:
        assert await disk.pread(0, 4096) == b"\5" * 4096
        assert disk.page_source is not None
        assert disk.page_source.runs is not None
        assert disk.page_source.runs.cells[0] == 0
    finally:
        disk.close()


async def test_truncated_file(compressed: Path) -> None:
    """A file that a program without locks makes shorter is an error, never other bytes."""
    disk = await opened(compressed)
    try:
        os.truncate(compressed, 4 * _STEP)
        with pytest.raises(HostError, match=r"image\.qcow2: data at \d+: found 0 bytes, expected"):
            await disk.pread(0, 2 * _STEP)
        with pytest.raises(HostError, match=r"image\.qcow2: data at \d+: found 0 bytes, expected"):
            disk.read_blocking(0, memoryview(bytearray(2 * _STEP)))
    finally:
        disk.close()


@pytest.mark.expect_log(SERVER_ENDED)
async def test_program_missing(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without qemu-img there is no map, and QEMU makes all reads."""

    def fail(*_arguments: object) -> None:
        msg = "found no program qemu-img"
        raise ForeignError(msg)

    monkeypatch.setattr(localreads, "start_mapping", fail)
    disk = await opened(compressed)
    try:
        assert await disk.pread(0, 4096) == b"\7" * 4096
        kill_server(compressed.parent)
        with pytest.raises(HostError, match="qemu-nbd: ended by SIGKILL"):
            await disk.pread(0, 4096)
    finally:
        disk.close()


async def test_closed_while_mapping(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The close ends a program that would never end, and its thread."""
    started = threading.Event()
    stuck = compressed.parent / "stuck"
    stuck.write_text("#!/bin/sh\nexec /usr/bin/sleep 1000\n", "utf-8")
    stuck.chmod(0o755)
    monkeypatch.setattr("qedfuse.foreign.mapping.find_program", lambda *_names: str(stuck))

    def fill(run_map: RunMap, output: BinaryIO, files: Sequence[tuple[int, int] | None]) -> None:
        started.set()
        mapping.fill_map(run_map, output, files)

    monkeypatch.setattr(localreads, "fill_map", fill)
    options = OpenOptions()
    disk = await open_foreign(PosixFile.open(str(compressed)), "qcow2", options)
    for _ in range(LOOKUPS_BEFORE_MAP):
        await disk.pread(0, 512)
    assert started.wait(60)
    disk.close()
    assert "qedfuse map" not in {thread.name for thread in threading.enumerate()}


async def test_files_stay_open_for_a_thread_that_outlives_the_close(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes the map never uses the number of a descriptor that was closed."""
    started, closed = threading.Event(), threading.Event()
    used: list[tuple[str, str]] = []

    def lock_late(fd: int, _mode: object, name: str) -> None:
        started.set()
        assert closed.wait(60)
        used.append((name, str(Path(f"/proc/self/fd/{fd}").readlink())))

    monkeypatch.setattr(localreads, "_JOIN_SECONDS", 0.01)
    monkeypatch.setattr(localreads, "lock_image", lock_late)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  the names alone
    disk = await open_foreign(PosixFile.open(str(compressed)), "qcow2", OpenOptions())
    for _ in range(LOOKUPS_BEFORE_MAP):
        await disk.pread(0, 512)
    assert started.wait(60)
    disk.close()
    closed.set()
    wait_for_map()
    assert used[0][0] == str(compressed)
    assert all(name == path for name, path in used)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208  the names alone


@pytest.mark.parametrize("is_started_early", [False, True])
async def test_no_thread_for_the_map(compressed: Path, *, is_started_early: bool) -> None:
    """Without a thread for the map QEMU makes the reads, and the close ends qemu-nbd."""
    disk = await open_foreign(PosixFile.open(str(compressed)), "qcow2", OpenOptions())
    assert isinstance(disk, ForeignFile)
    try:
        if is_started_early:
            run_without(CLONE3, disk.start_map)
        for _ in range(2 * LOOKUPS_BEFORE_MAP):
            assert not run_without(CLONE3, lambda: disk.try_read(0, memoryview(bytearray(512))))
        assert disk.page_source is not None
        assert disk.page_source.runs is not None
        assert disk.page_source.runs.cells[0] == 0
    finally:
        disk.close()
    assert processes(compressed.parent) == []


async def test_thread_for_the_map_later(compressed: Path) -> None:
    """If the host could not start a thread for the map, later reads make the map."""
    disk = await open_foreign(PosixFile.open(str(compressed)), "qcow2", OpenOptions())
    assert isinstance(disk, ForeignFile)
    try:
        run_without(CLONE3, disk.start_map)
        for _ in range(LOOKUPS_BEFORE_MAP):
            assert not disk.try_read(0, memoryview(bytearray(512)))
        wait_for_map()
        assert disk.try_read(0, memoryview(bytearray(512)))
    finally:
        disk.close()


_SHOW_THE_END: Final = """
from qedfuse.foreign.localreads import LocalReads
make_map = LocalReads._make_map
done = open({!r}, "x")  # a process in a sandbox cannot open it later
def make_and_show(*arguments):
    make_map(*arguments)
    print("done", file=done, flush=True)
LocalReads._make_map = make_and_show
"""


@pytest.mark.parametrize("sandbox", ["off", "on"])
def test_mount(compressed: Path, tmp_path: Path, sandbox: str) -> None:
    """A mount reads data without qemu-nbd; only reads of the compressed cluster fail.

    A server in a sandbox cannot run a program, so it runs the program before.
    """
    done = tmp_path / "done"
    prelude = _SHOW_THE_END.format(str(done))
    words = ("-r", "-o", f"sandbox={sandbox}", compressed, tmp_path / "mnt")
    with front(*words, prelude=prelude):
        disk = os.open(tmp_path / "mnt" / "image.qcow2.raw", os.O_RDONLY)
        try:
            os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)
            for number in range(LOOKUPS_BEFORE_MAP):
                assert os.pread(disk, 4096, number * 4096) == b"\7" * 4096
            wait_until(lambda: done.read_text() == "done\n")
            kill_server(tmp_path)
            for offset, value in ((100 << 10, 7), (1 << 20, 3), (8 << 20, 0)):
                assert os.pread(disk, 4096, offset) == bytes([value]) * 4096
            with pytest.raises(OSError, match="Input/output"):
                os.pread(disk, 4096, 128 << 10)
        finally:
            os.close(disk)
