"""Reading exports of real servers: nbdkit and qemu-nbd, in each way that they can serve."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.errors import RemoteError
from qedfuse.nbd.opening import open_nbd
from qedfuse.remote.options import Deadlines
from tests.support.nbdservers import serving_nbd, why_no_server

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.nbd.nbdfile import NbdFile

DEADLINES: Final = Deadlines(connect_seconds=20, attempt_seconds=20, total_seconds=40)
SERVERS: Final = {
    "nbdkit": ("nbdkit", "file", "{}"),
    "without structured replies": ("nbdkit", "--no-sr", "file", "{}"),
    "with limits": (
        *("nbdkit", "--filter=blocksize-policy", "file", "{}", "blocksize-minimum=4096"),
        *("blocksize-maximum=65536", "blocksize-error-policy=error"),
    ),
    "qemu-nbd": ("qemu-nbd", "-r", "-f", "raw", "-e", "8", "{}"),
    "qemu-nbd for one client": ("qemu-nbd", "-r", "-f", "raw", "{}"),
}


@pytest.fixture(params=SERVERS)
def words(request: pytest.FixtureRequest, exported: Path) -> list[str]:
    """Return the command of each server."""
    command = SERVERS[request.param]
    if reason := why_no_server(command[0]):
        pytest.skip(reason)
    return [word.format(exported) for word in command]


def ranges(seed: int, size: int) -> list[tuple[int, int]]:
    """Return some (offset, length), of which some pass the end of the file."""
    draw = random.Random(seed)
    lengths = (1, 511, 4096, 5000, 70000, (2 << 20) + 5)
    return [(draw.randrange(size), draw.choice(lengths)) for _ in range(15)]


def read_in_threads(file: NbdFile, content: bytes) -> None:
    """Read ranges in four threads, and compare them."""

    def read(seed: int) -> None:
        for offset, length in ranges(seed, len(content)):
            buffer = bytearray(length)
            count = file.read_blocking(offset, memoryview(buffer))
            assert buffer[:count] == content[offset : offset + length]

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(read, range(4)):
            pass


async def read_in_tasks(file: NbdFile, content: bytes) -> None:
    """Read ranges in 16 tasks, and compare them."""

    async def read(seed: int) -> None:
        for offset, length in ranges(seed, len(content)):
            assert await file.pread(offset, length) == content[offset : offset + length]

    async with trio.open_nursery() as nursery:
        for seed in range(10, 26):
            nursery.start_soon(read, seed)


async def test_tasks_and_threads_read_what_the_server_has(
    words: list[str], tmp_path: Path, content: bytes
) -> None:
    """Tasks and threads that read concurrently get the right bytes from each server."""
    with serving_nbd(tmp_path, *words) as connect:
        file = await trio.to_thread.run_sync(open_nbd, connect, "", "x", DEADLINES)
        try:
            assert file.size() == len(content)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_in_tasks, file, content)
                nursery.start_soon(trio.to_thread.run_sync, read_in_threads, file, content)
        finally:
            file.close()


def test_reads_go_on_after_the_server_was_started_again(exported: Path, tmp_path: Path) -> None:
    """A read after a restart of the server makes a new connection."""
    if reason := why_no_server("qemu-nbd"):
        pytest.skip(reason)
    buffer = bytearray(4096)
    server = ("qemu-nbd", "-r", "-f", "raw", exported)  # ends although a client is connected
    with serving_nbd(tmp_path, *server) as connect:
        file = open_nbd(connect, "", "x", DEADLINES)
        file.read_blocking(0, memoryview(buffer))
    try:
        with serving_nbd(tmp_path, *server):
            assert file.read_blocking(4096, memoryview(buffer)) == len(buffer)
        assert buffer == exported.read_bytes()[4096:8192]
    finally:
        file.close()


def test_an_export_that_is_missing_is_refused(exported: Path, tmp_path: Path) -> None:
    """The error for an export that the server does not have names it, and the exit code is 26."""
    if reason := why_no_server("qemu-nbd"):
        pytest.skip(reason)
    with (
        serving_nbd(tmp_path, "qemu-nbd", "-r", "-f", "raw", "-x", "one", exported) as connect,
        pytest.raises(RemoteError, match=r"^x: found no such export \(.*\)$") as caught,
    ):
        open_nbd(connect, "other", "x", DEADLINES)
    assert caught.value.exit_code == 26
