"""A host file that does not answer, or fails, affects only its own disk."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from tests.support import extensions, qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.mounted import TIMEOUT, front, is_mounted, qedfuse
from tests.support.pagecache import drop_pages
from tests.support.stallingfs import StallingFile, stalling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

DISK_BYTES: Final = 16 << 20
BLOCK: Final = 4096
LONG: Final = 1 << 17
MANY: Final = 200
"""More requests than pyfuse3 has tasks by default (99), than one file may have threads (32), and
than a kernel that allows 64 background requests for each of two disks sends."""
READS_OF_FILE: Final = 28
"""How many threads may read one file."""
CONNECTION_ENDED: Final = f"{os.strerror(errno.ECONNABORTED)}|{os.strerror(errno.ENOTCONN)}"
"""What a request gets that the server has not answered, or that is made after its end."""
SLOW_DISKS: Final = 5
"""So many files that do not answer read with more than 128 threads."""


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
    if extensions.EXPECTED:
        fallocate(fd, FALLOC_PUNCH_HOLE, 4 << 20, 1 << 20)
        assert read(fd, 4 << 20) == bytes(BLOCK)
    assert write(fd, 4 << 20, b"n") == BLOCK
    os.fsync(fd)
    assert read(fd, 4 << 20) == b"n" * BLOCK


class Call:
    """A request that a thread makes, and that may hang."""

    def __init__(self, pool: ThreadPoolExecutor, fd: int, action: Callable[[int], bool]) -> None:
        """Call ``action`` with the descriptor of a disk."""
        self._fd = fd
        self._started = threading.Event()
        self._thread = 0
        self._future: Future[bool] = pool.submit(self._run, action)

    def _run(self, action: Callable[[int], bool]) -> bool:
        self._thread = threading.get_native_id()
        self._started.set()
        return action(self._fd)

    def wait_until_it_hangs(self) -> None:
        """Wait until the thread sleeps in a system call on the descriptor.

        There is no event for this.  The kernel has queued the request then, or will when the
        requests before it on the same disk have ended.
        """
        assert self._started.wait(TIMEOUT)
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            # The number of the call and its arguments, or "running".  The first argument of a
            # thread that waits for the GIL is an address.
            words = Path(f"/proc/self/task/{self._thread}/syscall").read_text().split()
            if len(words) > 1 and int(words[1], 0) == self._fd:
                return
            assert self.hangs()
            os.sched_yield()
        msg = "the request does not hang"
        raise AssertionError(msg)

    def hangs(self) -> bool:
        """Return whether the call has not ended."""
        return not self._future.done()

    def result(self) -> bool:
        """Return the result of the action when it has ended."""
        return self._future.result(timeout=TIMEOUT)


SLOW: Final = {
    "read": lambda fd, number: read(fd, number * BLOCK) == b"s" * BLOCK,
    "write": lambda fd, number: write(fd, number * BLOCK, b"s") == BLOCK,
    "fsync": lambda fd, _number: sync(fd),
}


def call(action: Callable[[int, int], bool], number: int, fd: int) -> bool:
    """Call an action of `SLOW` on the block ``number`` of a disk."""
    return action(fd, number)


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
        waiting = [Call(pool, slow, partial(call, action, number)) for number in range(count)]
        try:
            for one in waiting:
                one.wait_until_it_hangs()
            file.wait_for(*[kind] * (READS_OF_FILE if kind == "read" and count == MANY else 1))
            pool.submit(use, fast, tmp_path / "fast.qed").result(timeout=TIMEOUT)
            assert all(one.hangs() for one in waiting)
        finally:
            file.release()
        assert all(one.result() for one in waiting)


def read_long(fd: int, _number: int) -> bool:
    """Read a range for which the kernel would take the pages of the host's file."""
    with mmap.mmap(-1, LONG) as buffer:
        assert os.preadv(fd, [buffer], 0) == LONG
        return buffer[:] == b"s" * LONG


@contextmanager
def image_on_disk(file: StallingFile, directory: Path) -> Iterator[Path]:
    """Make a file system in a file, and an image in the file system; yield the image's path."""
    with loop_device(file.path, "--direct-io=on") as device:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        with file_system(device, directory) as mounted:
            image = qemu.create(mounted / "slow.qed", DISK_BYTES)
            qemu.io(image, f"write -P {ord('s')} 0 {DISK_BYTES}")
            run("sync", "-f", image)
            yield image


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", ["disk", "server"])
def test_pages_that_the_host_is_reading_delay_only_their_own_disk(
    kind: str, before: int, tmp_path: Path
) -> None:
    """A read of pages that the kernel is still reading does not stop the other disks.

    ``before`` is how often the server has read the range when the pages leave the page cache.
    """
    host = tmp_path / "host.qed"
    fast_image = qemu.create(tmp_path / "fast.qed", DISK_BYTES)
    qemu.io(fast_image, f"write -P {ord('f')} 0 {DISK_BYTES}")
    if kind == "server":
        qemu.create(host, DISK_BYTES)
        qemu.io(host, f"write -P {ord('s')} 0 {DISK_BYTES}")
    else:
        with host.open("wb") as sparse:
            sparse.truncate(4 * DISK_BYTES)
    with ExitStack() as stack:
        file = stack.enter_context(stalling(host, tmp_path / "host", is_cached=kind == "server"))
        image = file.path
        if kind == "disk":
            image = stack.enter_context(image_on_disk(file, tmp_path / "fs"))
        mount = stack.enter_context(front(image, fast_image, tmp_path / "mnt"))
        slow, fast = (
            os.open(mount.mountpoint / f"{path.stem}.raw", os.O_RDWR | os.O_DIRECT)
            for path in (image, fast_image)
        )
        stack.callback(os.close, slow)
        stack.callback(os.close, fast)
        assert read(slow, DISK_BYTES - BLOCK) == b"s" * BLOCK  # the tables are in memory then
        for number in range(before):
            assert read_long(slow, number)
        drop_pages(image)
        pool = stack.enter_context(ThreadPoolExecutor(5))
        stack.callback(file.release)
        file.stall()
        # Another program: it brings the pages into the page cache, without a miss of the server.
        host_fd = os.open(image, os.O_RDONLY)
        stack.callback(os.close, host_fd)
        waiting = [Call(pool, host_fd, lambda fd: len(os.pread(fd, DISK_BYTES, 0)) > 0)]
        waiting[0].wait_until_it_hangs()
        file.wait_for("read")
        for number in range(3):
            waiting.append(Call(pool, slow, partial(call, read_long, number)))
            waiting[-1].wait_until_it_hangs()
        pool.submit(use, fast, fast_image).result(timeout=TIMEOUT)
        assert all(one.hangs() for one in waiting)
        file.release()
        assert all(one.result() for one in waiting)


def test_write_back_that_hangs_delays_only_its_own_disk(
    slow_and_fast: tuple[StallingFile, int, int], tmp_path: Path
) -> None:
    """While the kernel writes many pages of one disk back, another one answers."""
    file, slow, fast = slow_and_fast
    assert write(slow, BLOCK, b"s") == BLOCK  # the tables are in memory then
    cached = os.open(f"/proc/self/fd/{slow}", os.O_RDWR)
    try:
        # One request for each page, because no page is beside another one.
        for number in range(MANY):
            assert os.pwrite(cached, b"p" * BLOCK, 2 * number * BLOCK) == BLOCK
        with ThreadPoolExecutor(2) as pool:
            file.stall()
            waiting = Call(pool, cached, sync)
            try:
                waiting.wait_until_it_hangs()
                file.wait_for("write")
                pool.submit(use, fast, tmp_path / "fast.qed").result(timeout=TIMEOUT)
                assert waiting.hangs()
            finally:
                file.release()
            assert waiting.result()
    finally:
        os.close(cached)
    assert read(slow, 2 * BLOCK) == b"p" * BLOCK
    assert read(slow, BLOCK) == b"s" * BLOCK


@pytest.mark.parametrize("calls", ["native", "threads"])
def test_several_host_files_that_hang_delay_only_their_own_disks(
    calls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While several files occupy as many threads as each may, a disk on another file answers."""
    if calls == "threads":
        monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")
    fast_image = tmp_path / "fast.qed"
    slow_images = [tmp_path / f"slow{number}.qed" for number in range(SLOW_DISKS)]
    for image in (fast_image, *slow_images):
        qemu.create(image, DISK_BYTES)
        qemu.io(image, f"write -P {ord(image.name[0])} 0 {DISK_BYTES}")
    with ExitStack() as stack:
        files = [
            stack.enter_context(stalling(image, tmp_path / image.stem)) for image in slow_images
        ]
        paths = [file.path for file in files]
        mount = stack.enter_context(front(*paths, fast_image, tmp_path / "mnt"))
        pool = stack.enter_context(ThreadPoolExecutor(SLOW_DISKS * (READS_OF_FILE + 4) + 1))
        disks = []
        for image in (fast_image, *slow_images):
            path = mount.mountpoint / f"{image.stem}.raw"
            disks.append(os.open(path, os.O_RDWR | os.O_DIRECT))
            stack.callback(os.close, disks[-1])
        fast, *slow = disks
        for fd in slow:
            assert read(fd, 0) == b"s" * BLOCK  # the tables are in memory then
        for file in files:
            stack.callback(file.release)
            file.stall()
        waiting = [
            Call(pool, fd, partial(call, SLOW["read"], number))
            for number in range(READS_OF_FILE + 4)
            for fd in slow
        ]
        for one in waiting:
            one.wait_until_it_hangs()
        for file in files:
            file.wait_for(*["read"] * READS_OF_FILE)
        pool.submit(use, fast, fast_image).result(timeout=TIMEOUT)
        assert all(one.hangs() for one in waiting)
        for file in files:
            file.release()
        assert all(one.result() for one in waiting)


def close(fd: int) -> None:
    """Close a file; its server may have ended, which the system call reports as an error."""
    with suppress(OSError):
        os.close(fd)


def test_an_end_by_force_fails_all_requests_although_a_host_file_hangs(tmp_path: Path) -> None:
    """After a second SIGTERM programs get errors, also those that use another disk."""
    for name in ("slow", "fast"):
        qemu.create(tmp_path / f"{name}.qed", DISK_BYTES)
        qemu.io(tmp_path / f"{name}.qed", f"write -P {ord(name[0])} 0 {DISK_BYTES}")
    with (
        ThreadPoolExecutor(2) as pool,
        stalling(tmp_path / "slow.qed", tmp_path / "host") as file,
        front(file.path, tmp_path / "fast.qed", tmp_path / "mnt") as mount,
        ExitStack() as stack,
    ):
        slow, fast = (
            os.open(mount.mountpoint / f"{name}.raw", os.O_RDWR | os.O_DIRECT)
            for name in ("slow", "fast")
        )
        for fd in (slow, fast):
            read(fd, 0)  # the tables are in memory then
            stack.callback(close, fd)
        stack.callback(file.release)
        file.stall()
        waiting = Call(pool, slow, partial(call, SLOW["read"], 1))
        waiting.wait_until_it_hangs()
        file.wait_for("read")
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        mount.signal(signal.SIGTERM)

        def read_until_it_fails() -> None:
            while True:
                read(fast, 0)

        with pytest.raises(OSError, match=rf"{CONNECTION_ENDED}"):
            pool.submit(read_until_it_fails).result(timeout=TIMEOUT)
        with pytest.raises(OSError, match=rf"{CONNECTION_ENDED}"):
            waiting.result()
        assert not is_mounted(mount.mountpoint)
        file.release()
        code, log = mount.finish()
        assert code == 0, log
        assert "failed" not in log
        assert "rror" not in log.replace("I/O errors", "")
    for name in ("slow", "fast"):
        assert qemu.check(tmp_path / f"{name}.qed").code == 0


UNCACHED: Final = """
import qedfuse.mount.fuse.attributes
qedfuse.mount.fuse.attributes._ATTR_TIMEOUT_SECONDS = 0.0
"""
"""Code that makes the kernel ask the server for attributes each time."""


def test_a_host_file_that_fails_does_not_hide_other_disks(tmp_path: Path) -> None:
    """The directory still has its attributes and all names if the host refuses those of one file.

    Requests that need the file itself fail with the host's error.
    """
    for name in ("dead", "good"):
        qemu.create(tmp_path / f"{name}.qed", DISK_BYTES)
    paths = (tmp_path / "host" / "dead.qed", tmp_path / "good.qed")
    with (
        stalling(tmp_path / "dead.qed", tmp_path / "host", attr_timeout=0) as file,
        front(*paths, tmp_path / "mnt", prelude=UNCACHED) as mount,
    ):
        before = mount.mountpoint.stat()
        file.kill()
        names = ["dead.raw", "good.raw"]
        assert sorted(os.listdir(mount.mountpoint)) == names  # noqa: PTH208  reads only names
        assert sorted(entry.name for entry in mount.mountpoint.iterdir()) == names
        assert mount.mountpoint.stat().st_mtime == before.st_mtime
        assert (mount.mountpoint / "good.raw").read_bytes() == bytes(DISK_BYTES)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            (mount.mountpoint / "dead.raw").stat()
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.statvfs(mount.mountpoint)  # that of the first disk
        mount.signal(signal.SIGTERM)
        _code, log = mount.finish()
    assert "statvfs: Transport endpoint is not connected" in log
    assert "internal error" not in log
