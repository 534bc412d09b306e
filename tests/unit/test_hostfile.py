"""The host's file: refusals at opening, short and long transfers, failures."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from qedfuse.errors import HostError, ImageError, NoSpaceError, QedError
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from qedfuse.hostio.inlinepolicy import ALWAYS_SHORT_WRITE_BYTES
from qedfuse.hostio.nativecalls import make_io_threads
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.regular import length_of, status_of
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["native", "threads"], autouse=True)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make calls that may block in native threads, or in threads of trio; return which."""
    kind: str = request.param
    if kind == "native" and make_io_threads() is None:
        pytest.skip("the extension was not built")
    monkeypatch.setenv(HOST_CALLS_VARIABLE, kind)
    return kind


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PosixFile]:
    """Open an empty file for writing."""
    path = tmp_path / "file"
    path.touch()
    opened = PosixFile.open(str(path), writable=True)
    yield opened
    opened.close()


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fifo", "a FIFO"),
        ("directory", "a directory"),
        ("device", "a character device"),
        ("socket", "a socket"),
    ],
)
def test_only_regular_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str, *, writable: bool
) -> None:
    """A file that is not regular is refused by its kind, without being opened."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(kind)
        elif kind == "directory":
            Path(kind).mkdir()
        elif kind == "device":
            Path(kind).symlink_to("/dev/null")
        else:
            server.bind(kind)
        with pytest.raises(ImageError) as caught:
            PosixFile.open(kind, writable=writable)
    assert str(caught.value) == f"{kind}: found {words}, expected a regular file"


def test_file_of_unknown_kind() -> None:
    """A file of a kind without a name is refused."""
    poll = os.eventfd(0)
    try:
        with pytest.raises(ImageError, match="found a special file, expected a regular file"):
            PosixFile.open(f"/proc/self/fd/{poll}")
    finally:
        os.close(poll)


@pytest.mark.parametrize(
    ("name", "number"), [("missing", errno.ENOENT), ("loop", errno.ELOOP), ("x" * 300, 36)]
)
def test_open_failures_name_the_file(tmp_path: Path, name: str, number: int) -> None:
    """A failed open is reported in one line with the file and the host's reason."""
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / name)
    with pytest.raises(HostError) as caught:
        PosixFile.open(path)
    assert caught.value.errno == number
    assert str(caught.value) == f"{path}: cannot open: {os.strerror(number)}"


def test_name_is_safe_to_print(tmp_path: Path) -> None:
    """A name with a newline is escaped in messages and opened unchanged."""
    path = tmp_path / "two\nlines"
    path.write_bytes(b"here")
    file = PosixFile.open(str(path))
    assert file.name == str(tmp_path / "two\\nlines")
    assert file.path == str(path)
    file.close()


def test_a_file_keeps_the_directory_of_its_path(tmp_path: Path) -> None:
    """The directory of a file stays the one in which its name was looked up, until it is closed."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "base").write_bytes(b"base")
    file = PosixFile.open(str(tmp_path / "first" / "base"))
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "first").symlink_to("second")
    assert file.directory is not None
    assert file.directory.path == str(tmp_path / "moved")
    assert file.size() == 4
    fd = file.directory.fd
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("path", ["", "no/file", "file/", "file/x", "directory/", "directory"])
def test_a_path_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """An error about the directory of a file names the path of the file; nothing stays open."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  the names alone
    with pytest.raises(QedError) as caught:
        PosixFile.open(path)
    expected = "found a directory" if path.startswith("directory") else "cannot open: "
    assert str(caught.value).startswith(f"{printable(path)}: {expected}")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208  the names alone


async def test_read_is_short_only_at_the_end(file: PosixFile) -> None:
    """A read is short only past the end of the file."""
    await file.pwrite(0, b"0123456789")
    assert await file.pread(2, 4) == b"2345"
    assert await file.pread(8, 4) == b"89"
    assert await file.pread(10, 4) == b""
    assert await file.pread(1 << 40, 4) == b""
    assert await file.pread(3, 0) == b""
    buffer = bytearray(b"....")
    assert await file.pread_into(9, memoryview(buffer)) == 1
    assert buffer == b"9..."


@pytest.mark.parametrize("number", [None, errno.EAGAIN, errno.EOPNOTSUPP])
async def test_read_without_the_page_cache(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch, calls: str, number: int | None
) -> None:
    """Bytes that are not in the page cache are read by a thread."""
    await file.pwrite(0, bytes(range(200)))
    real = os.preadv
    flags_seen = []

    def preadv(fd: int, views: tuple[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags and number is not None:
            raise OSError(number, os.strerror(number))
        # Without an error, a call transfers only a part, and the rest needs another call.
        return real(fd, (views[0][:7],), offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert await file.pread(10, 100) == bytes(range(10, 110))
    assert await file.pread(190, 100) == bytes(range(190, 200))
    tried = flags_seen.count(os.RWF_NOWAIT)
    if number == errno.EAGAIN and calls == "threads":
        assert tried > 2, "tried again before a thread is asked"
    else:
        assert tried == (1 if number == errno.EOPNOTSUPP else 2)


async def test_a_file_in_memory_is_read_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of tmpfs, which refuses RWF_NOWAIT, needs no thread for its reads."""
    file = PosixFile(os.memfd_create("memory"), "memory", writable=True)
    await file.pwrite(0, b"0123456789")

    async def in_thread(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(PosixFile, "_read_in_thread", in_thread)
    for _ in range(10):
        assert await file.pread(2, 4) == b"2345"
        view = memoryview(bytearray(4))
        assert file.try_read(6, view)
        assert bytes(view) == b"6789"
    assert file.read_policy.uncached == 0
    assert not file.read_policy.can_queue
    file.close()


@pytest.mark.parametrize("count", [1, 1024, 1025, 3000])
async def test_write_of_many_parts(file: PosixFile, count: int) -> None:
    """More buffers than one system call takes are written as one write, empty ones included."""
    parts = [bytes([index % 251]) * ((index + 1) % 5) for index in range(count)]
    await file.pwrite(3, *parts)
    assert await file.pread(0, 1 << 20) == bytes(3) + b"".join(parts)


@pytest.mark.parametrize("length", [0, 1, ALWAYS_SHORT_WRITE_BYTES, ALWAYS_SHORT_WRITE_BYTES + 1])
async def test_write_in_the_loop_and_in_a_thread(file: PosixFile, length: int) -> None:
    """Short and long writes of any buffer type are written completely."""
    data = os.urandom(length)
    await file.pwrite(1, data, bytearray(data), memoryview(data))
    assert await file.pread(0, 1 << 22) == (b"\0" + data * 3 if length else b"")


async def test_short_writes_of_the_host_are_continued(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of which the host accepts a few bytes at a time is written completely."""
    real = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [b"".join(views)[:3]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    await file.pwrite(0, b"ab", b"", b"cdefg", b"h", b"ij")
    assert await file.pread(0, 100) == b"abcdefghij"


async def test_holes(file: PosixFile) -> None:
    """next_data finds data across holes, and None past the last data."""
    megabyte = 1 << 20
    await file.truncate(8 * megabyte)
    await file.pwrite(4 * megabyte, b"x")
    first = await file.next_data(0)
    # A file system that keeps no holes calls everything data.
    assert first in (0, 4 * megabyte)
    assert await file.next_data(4 * megabyte) == 4 * megabyte
    assert await file.next_data(8 * megabyte) is None
    assert await file.next_data(9 * megabyte) is None


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
async def test_file_system_that_keeps_no_holes(
    file: PosixFile, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """Where the host has no SEEK_DATA the whole file is data."""
    seek = os.lseek

    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(refusal, os.strerror(refusal))
        return seek(fd, offset, whence)

    await file.truncate(10)
    monkeypatch.setattr(os, "lseek", lseek)
    assert await file.next_data(3) == 3
    assert await file.next_hole(3) == 10
    assert await file.next_data(10) is None


async def test_truncate_and_datasync(file: PosixFile) -> None:
    """truncate() shortens and lengthens the file, and added bytes are zeros."""
    await file.pwrite(0, b"abcdef")
    await file.truncate(3)
    await file.truncate(5)
    await file.datasync()
    assert file.size() == file.stat().st_size == 5
    assert await file.pread(0, 10) == b"abc\0\0"


@pytest.mark.parametrize("length", [1, ALWAYS_SHORT_WRITE_BYTES + 1])
async def test_full_host(length: int) -> None:
    """A full host raises NoSpaceError, inline and in a thread."""
    full = PosixFile(os.open("/dev/full", os.O_RDWR), "full", writable=True)
    with pytest.raises(NoSpaceError) as caught:
        await full.pwrite(0, bytes(length))
    assert str(caught.value) == f"full: write: {os.strerror(errno.ENOSPC)}"
    assert caught.value.errno == errno.ENOSPC
    full.close()


async def test_failures_become_host_errors(tmp_path: Path) -> None:
    """Each failed system call raises a HostError with its name and errno."""
    path = tmp_path / "file"
    path.write_bytes(b"0123")
    read_only = PosixFile.open(str(path))
    with pytest.raises(HostError, match=r"/file: write: Bad file descriptor$") as caught:
        await read_only.pwrite(0, b"x")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(HostError, match=r"/file: truncate: Invalid argument$"):
        await read_only.truncate(0)
    read_only.close()
    write_only = PosixFile(os.open(path, os.O_WRONLY), "file", writable=True)
    with pytest.raises(HostError, match=r"^file: read: Bad file descriptor$"):
        await write_only.pread(0, 4)
    write_only.close()
    no_disk = PosixFile(os.open("/dev/null", os.O_RDWR), "null", writable=True)
    with pytest.raises(HostError, match=r"^null: datasync: Invalid argument$"):
        await no_disk.datasync()
    no_disk.close()


def test_close_twice(file: PosixFile) -> None:
    """A second close does nothing to a descriptor that was opened meanwhile."""
    file.close()
    other = os.open("/dev/null", os.O_RDONLY)  # gets the number that is free now
    file.close()
    os.fstat(other)
    os.close(other)


def test_attributes_of_a_file_that_the_host_refuses(tmp_path: Path) -> None:
    """Failed calls for size and attributes raise a HostError."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    file = PosixFile.open(str(path))
    os.close(file.fd)
    for ask in (file.size, file.stat):
        with pytest.raises(HostError, match=r"file: stat: Bad file descriptor$"):
            ask()
    with pytest.raises(HostError, match=r"^disk: seek: Bad file descriptor$"):
        length_of(file.fd, "disk")
    with pytest.raises(HostError, match=r"^disk: stat: No such file or directory$"):
        status_of(str(tmp_path / "gone"), "disk")
    file.fd = -1
