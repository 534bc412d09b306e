"""Reads that a mount answers in special ways: from the page cache, and by a native thread."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE, NATIVE, THREADS
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from qedfuse.mount.fuse import extraops
from tests.support import extensions, qemu
from tests.support.extensions import needs_extensions
from tests.support.mounted import front
from tests.support.openfiles import open_files
from tests.support.webserver import serving

FUSE_DEVICE: Final = "/dev/fuse"
DISK_BYTES: Final = 16 << 20
WAYS: Final = (None, NATIVE)
"""Values of the variable that the tests set; a whole run sets `THREADS`."""


def make_image(directory: Path) -> tuple[list[Path], bytes]:
    """Make an overlay that holds every third MiB of its disk; return the chain and the content."""
    base, overlay = directory / "base.qed", directory / "disk.qed"
    content = bytearray(random.Random("base").randbytes(DISK_BYTES))
    raw = directory / "raw"
    raw.write_bytes(content)
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qed", raw, base)
    raw.unlink()
    qemu.create(overlay, backing=base)
    for start in range(0, DISK_BYTES, 3 << 20):
        value = 1 + (start >> 20)
        content[start : start + (1 << 20)] = bytes([value]) * (1 << 20)
        qemu.io(overlay, f"write -P {value} {start} 1M")
    return [overlay, base], bytes(content)


def read_direct(fd: int, offset: int, length: int) -> bytes:
    """Read with O_DIRECT: the kernel sends requests of this length, or of the longest permitted."""
    with mmap.mmap(-1, length) as buffer:
        count = os.preadv(fd, [buffer], offset)
        return buffer[:count]


def drop_pages(*paths: Path) -> None:
    """Drop the pages of files from the host's page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def pipes(pid: int) -> int:
    """Return how many ends of pipes a process has open."""
    return sum(target.startswith("pipe:") for target in open_files(pid).values())


def native_threads(pid: int) -> int:
    """Return how many native threads for host I/O a process has."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            count += (task / "comm").read_text() == "qedfuse-io\n"
    return count


def rings(pid: int) -> int:
    """Return how many queues of reads a process has."""
    return list(open_files(pid).values()).count("anon_inode:[io_uring]")


def may_queue() -> bool:
    """Return whether mounts have a queue for reads, by this kernel and the variable."""
    if os.environ.get(HOST_CALLS_VARIABLE) in (THREADS, NATIVE):
        return False
    try:
        extraops.open_read_queue(lambda *_: None, 1.0)
    except (OSError, RuntimeError):
        return False
    extraops.close_read_queue()
    return True


def choose(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mounts read in a certain way; None for the usual one."""
    if way is not None:
        monkeypatch.setenv(HOST_CALLS_VARIABLE, way)


def test_long_reads_are_passed_on_from_the_page_cache(tmp_path: Path) -> None:
    """Reads of all lengths, within a run and across runs, return the content of the chain."""
    paths, content = make_image(tmp_path)
    for path in paths:
        path.read_bytes()
    chance = random.Random(1)
    with front(paths[0], tmp_path / "mnt") as mount:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        before = pipes(mount.process.pid)
        for length in (4096, 16384, 32768, 65536, 1 << 18, 1 << 19, (1 << 19) + 4096, 1 << 20):
            for _ in range(12):
                offset = chance.randrange((DISK_BYTES - length) // 4096 + 1) * 4096
                assert read_direct(fd, offset, length) == content[offset : offset + length]
        assert read_direct(fd, DISK_BYTES - 4096, 65536) == content[-4096:]
        has_pipe = pipes(mount.process.pid) > before
        assert has_pipe == extensions.EXPECTED, "libfuse has a pipe for its replies"
        os.close(fd)


def test_long_reads_of_a_cached_base_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of all lengths return what a server has, from its cache and after that was cut."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, _ = make_image(tmp_path)
    content = qemu.content(paths[1])
    chance = random.Random(2)
    with (
        serving(paths[1].read_bytes()) as server,
        front("-r", server.url, tmp_path / "mnt") as mount,
    ):
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDONLY | os.O_DIRECT)

        def check(rounds: int) -> None:
            for length in (4096, 16384, 32768, 65536, 1 << 18, 1 << 19, (1 << 19) + 4096, 1 << 20):
                for _ in range(rounds):
                    offset = chance.randrange((DISK_BYTES - length) // 4096 + 1) * 4096
                    assert read_direct(fd, offset, length) == content[offset : offset + length]

        before = pipes(mount.process.pid)
        for offset in range(0, DISK_BYTES, 1 << 20):
            assert read_direct(fd, offset, 1 << 20) == content[offset : offset + (1 << 20)]
        requests = len(server.requests)
        check(12)
        assert len(server.requests) == requests
        expected = 4 if extensions.EXPECTED else 0
        assert pipes(mount.process.pid) - before == expected, "one of libfuse, one of the extension"
        (data,) = (tmp_path / "cache").rglob("data")
        os.truncate(data, data.stat().st_size // 2)
        check(4)
        assert len(server.requests) > requests, "read what is not there any more"
        os.close(fd)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
        assert code == 0, log


@pytest.mark.parametrize("way", WAYS)
def test_cold_reads_return_the_content(
    way: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concurrent reads whose data is not in the host's page cache return the content.

    The queue of the kernel makes the short ones; without it native threads make all.  Without the
    extension threads of trio make them.
    """
    choose(way, monkeypatch)
    paths, content = make_image(tmp_path)
    with front(paths[0], tmp_path / "mnt") as mount, ThreadPoolExecutor(16) as pool:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        has_queue = extensions.EXPECTED and way is None and may_queue()
        assert rings(mount.process.pid) == has_queue

        def read(number: int) -> bool:
            chance = random.Random(number)
            offset = chance.randrange(DISK_BYTES // 4096 - 16) * 4096
            length = chance.choice((4096, 16384, 65536))
            return read_direct(fd, offset, length) == content[offset : offset + length]

        for turn in range(4):
            drop_pages(*paths)
            assert all(pool.map(read, range(turn * 1000, turn * 1000 + 500)))
        has_threads = extensions.EXPECTED if way == NATIVE else extensions.NATIVE_THREADS
        assert (native_threads(mount.process.pid) > 0) == has_threads
        os.close(fd)


@needs_extensions
def test_short_cold_reads_need_no_thread(tmp_path: Path) -> None:
    """Reads of at most 16 KiB are queued, so no thread makes them once the tables are in memory."""
    if not may_queue():
        pytest.skip("no io_uring, or it is turned off")
    image = tmp_path / "disk.qed"
    qemu.create(image, DISK_BYTES)
    qemu.io(image, f"write -P 7 0 {DISK_BYTES}")
    with front("-r", image, tmp_path / "mnt") as mount, ThreadPoolExecutor(16) as pool:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        for _ in range(2):  # brings the tables into memory, and the way to find them
            assert read_direct(fd, 0, 4096) == b"\7" * 4096
        before = native_threads(mount.process.pid)

        def is_right(at: int) -> bool:
            length = 4096 if at % (1 << 17) else 16384
            return read_direct(fd, at, length) == b"\7" * length

        for _ in range(2):
            drop_pages(image)
            assert all(pool.map(is_right, range(0, DISK_BYTES, 65536)))
        assert native_threads(mount.process.pid) <= before, "idle threads may have ended"
        os.close(fd)


@pytest.mark.parametrize("way", WAYS)
def test_cold_reads_beside_writes_and_discards_see_no_other_clusters(
    way: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read sees the old or the new content of its own cluster while clusters change owners."""
    choose(way, monkeypatch)
    image = tmp_path / "disk.qed"
    clusters = 64
    qemu.create(image, clusters << 16)
    with front(image, tmp_path / "mnt") as mount, ThreadPoolExecutor(12) as pool:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDWR | os.O_DIRECT)

        def fill(cluster: int) -> None:
            with mmap.mmap(-1, 1 << 16) as buffer:
                buffer[:] = bytes([cluster + 1]) * (1 << 16)
                os.pwritev(fd, [buffer], cluster << 16)

        def change(number: int) -> int:
            chance = random.Random(number)
            for _ in range(40):
                cluster = chance.randrange(clusters)
                if extensions.EXPECTED:
                    fallocate(fd, FALLOC_PUNCH_HOLE, cluster << 16, 1 << 16)
                if chance.random() < 0.3:
                    os.fsync(fd)
                fill(cluster)
                drop_pages(image)
            return 0

        def read(number: int) -> int:
            chance = random.Random(number)
            for _ in range(300):
                cluster = chance.randrange(clusters)
                at = (cluster << 16) + chance.randrange(16) * 4096
                assert read_direct(fd, at, 4096) in (bytes(4096), bytes([cluster + 1]) * 4096)
            return 1

        for cluster in range(clusters):
            fill(cluster)
        drop_pages(image)
        tasks = [pool.submit(change if number < 4 else read, number) for number in range(12)]
        assert sum(task.result() for task in tasks) == 8
        os.close(fd)
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    assert qemu.check(image).code == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_cold_read_past_the_end_of_a_file_that_was_cut_fails(
    way: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another program has cut the image, a read fails with EIO, and returns no zeros."""
    choose(way, monkeypatch)
    paths, content = make_image(tmp_path)
    with front("-r", paths[0], tmp_path / "mnt") as mount:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        assert read_direct(fd, 0, 4096) == content[:4096]
        os.truncate(paths[1], 1 << 20)
        drop_pages(*paths)
        failures: list[int | None] = []
        for offset in range(1 << 21, 3 << 20, 1 << 16):
            for length in (4096, 65536):
                try:
                    read_direct(fd, offset, length)
                except OSError as error:
                    failures.append(error.errno)
        assert failures == [errno.EIO] * 32
        assert read_direct(fd, 0, 4096) == content[:4096]
        os.close(fd)
        mount.signal(signal.SIGTERM)
        assert "expected" in mount.finish()[1]


@needs_extensions
def test_a_request_that_vanishes_does_not_stop_the_server(tmp_path: Path) -> None:
    """The server reads the kernel's requests without blocking."""
    image = tmp_path / "disk.qed"
    qemu.create(image, DISK_BYTES)
    with front(image, tmp_path / "mnt") as mount:
        pid = mount.process.pid
        (fd,) = (fd for fd, target in open_files(pid).items() if target == FUSE_DEVICE)
        info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        flags = info.partition("flags:")[2].split()[0]
        assert int(flags, 8) & os.O_NONBLOCK
