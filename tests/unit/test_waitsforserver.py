"""Files whose calls a server answers, which may not answer: the event loop changes none of them."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.hostio import posixfile, systemcalls
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.systemcalls import waits_for_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def loop_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a list of the calls that wait for a server and that the thread of the test makes."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")
    loop = threading.get_ident()
    made: list[str] = []

    def watched(name: str) -> object:
        real = getattr(os, name)

        def call(*arguments: object, **keywords: object) -> object:
            if threading.get_ident() == loop:
                made.append(name)
            return real(*arguments, **keywords)

        return call

    for name in ("pwrite", "pwritev", "ftruncate", "fdatasync", "lseek", "utime"):
        monkeypatch.setattr(os, name, watched(name))
    return made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PosixFile]:
    """Open an empty file for writing."""
    path = tmp_path / "file"
    path.touch()
    opened = PosixFile.open(str(path), writable=True)
    yield opened
    opened.close()


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> PosixFile:
    """Open an empty file that seems to be in a file system with a server."""
    monkeypatch.setattr(posixfile, "waits_for_server", lambda _fd: True)
    opened: PosixFile = request.getfixturevalue("file")
    return opened


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0x65735546, True), (0x6969, True), (0xFE534D42, True), (0xEF53, False), (0x01021994, False)],
    ids=["FUSE", "NFS", "SMB", "ext4", "tmpfs"],
)
def test_file_systems_with_a_server(
    monkeypatch: pytest.MonkeyPatch, number: int, *, expected: bool
) -> None:
    """File systems of networks and FUSE wait for a server, those on local disks do not."""

    def fstatfs(_fd: int, result: ctypes.Array[ctypes.c_char]) -> int:
        ctypes.c_long.from_buffer(result).value = number
        return 0

    monkeypatch.setattr(systemcalls, "_fstatfs", fstatfs)
    assert waits_for_server(0) is expected


def test_a_file_on_a_local_file_system(tmp_path: Path) -> None:
    """A file of the test's own directory and one of procfs wait for no server."""
    (tmp_path / "file").touch()
    for name in (tmp_path / "file", "/proc/version"):
        with open(name, "rb") as found:  # noqa: PTH123  a string or a path
            assert not waits_for_server(found.fileno())


def test_a_file_system_that_does_not_say_what_it_is() -> None:
    """A file whose file system is unknown counts as one that waits for a server."""
    assert waits_for_server(-1)


async def test_the_event_loop_changes_no_remote_file(
    remote: PosixFile, loop_calls: list[str]
) -> None:
    """Whatever was fast before, changes, datasyncs and searches for holes run in threads."""
    for _ in range(20):
        assert not remote.can_write_inline(1)
        assert not remote.try_write(0, b"x")
        assert not remote.try_grow(1 << 20)
        assert not remote.try_datasync()
        await remote.pwrite(0, b"short")
        await remote.datasync()
        await remote.truncate(1 << 20)
        assert await remote.next_data(0) == 0
        await remote.set_times(1, 2)
    assert loop_calls == []
    assert await remote.pread(0, 5) == b"short"


async def test_the_event_loop_changes_a_local_file(file: PosixFile, loop_calls: list[str]) -> None:
    """A file in a local file system is changed by the event loop."""
    assert file.try_write(0, b"x")
    assert file.try_grow(1 << 20)
    await file.pwrite(0, b"short")
    assert await file.next_data(0) == 0
    assert loop_calls[:2] == ["pwrite", "ftruncate"]


async def test_searches_that_hang_occupy_a_part_of_the_threads(
    remote: PosixFile, monkeypatch: pytest.MonkeyPatch, loop_calls: list[str]
) -> None:
    """At most 28 searches for holes of one file wait in threads."""
    released = threading.Event()
    ended: list[int] = []

    def seek(_fd: int, offset: int, _whence: int) -> None:
        assert released.wait(60)
        ended.append(offset)

    monkeypatch.setattr(posixfile, "seek", seek)
    limiter = trio.to_thread.current_default_thread_limiter()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(remote.next_data, 0)
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 28
        released.set()
    assert len(ended) == 100
    assert loop_calls == []
