"""The cache: right after any damage, shared by processes, within its limits."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, cast

import pytest
import trio

from qedfuse.errors import CacheError, RemoteError
from qedfuse.hostio.residency import Residency
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from qedfuse.remote import cacheentry, localdata
from qedfuse.remote.address import parse_address
from qedfuse.remote.cachedirectory import CacheDirectory, CacheOptions
from qedfuse.remote.cacheentry import discard_entry
from qedfuse.remote.cachemetadata import entry_name, read_metadata
from qedfuse.remote.cacheroot import default_directory
from qedfuse.remote.client import Version
from qedfuse.remote.localdata import LocalData
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import RemoteOptions
from qedfuse.remote.unitfile import UNIT_BYTES, UnitFile, make_files, open_directory
from qedfuse.remote.unitstore import UnitStore
from qedfuse.remote.zeroblocks import ZeroBlocks
from tests.support import forkserver
from tests.support.pagecache import drop_pages
from tests.support.programs import TREE
from tests.support.remotes import DEADLINES, opened, read, some_bytes
from tests.support.webserver import WebServer, serving, wait_until

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from tests.support.nginx import Nginx
    from tests.support.programs import Process

UNITS: Final = 9
CONTENT: Final = some_bytes(UNITS - 0.5)
ADDRESS: Final = parse_address("https://host/disk.qed")

damaged = pytest.mark.expect_log("the cache was damaged; going on without it")
from_cache = pytest.mark.expect_log("reading it from the cache")


def entry_of(cache: Path) -> Path:
    """Return the directory of the only entry of a cache."""
    (entry,) = cache.glob("object-*/version-*")
    return entry


def fill(server: WebServer, cache: Path) -> Path:
    """Read all of an object through a cache; return the directory of its entry."""
    with opened(server.url, cache) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    return entry_of(cache)


def flip(path: Path, offset: int, bits: int = 1) -> None:
    """Flip bits of a byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def truncate(path: Path) -> None:
    """Cut a file in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Cut a file at its beginning."""
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    """Add bytes to a file."""
    os.truncate(path, path.stat().st_size + 2)


def zero(path: Path) -> None:
    """Replace the content of a file by a hole."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def into_link(path: Path) -> None:
    """Replace a file by a symbolic link to a copy of it."""
    copy = path.with_name("copy")
    path.rename(copy)
    path.symlink_to(copy)


def into_directory(path: Path) -> None:
    """Replace a file by a directory."""
    path.unlink()
    path.mkdir()


def into_fifo(path: Path) -> None:
    """Replace a file by a FIFO."""
    path.unlink()
    os.mkfifo(path)


DAMAGES: Final = (*(remove, truncate, empty, lengthen, zero, into_link, into_directory, into_fifo),)


def test_second_reading_needs_no_request(tmp_path: Path) -> None:
    """What was read once is read from the cache by the next process, without a request for data."""
    with serving(CONTENT) as server:
        fill(server, tmp_path)
        server.requests.clear()
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert trio.run(file.pread, 5, len(CONTENT)) == CONTENT[5:]
            assert file.fetcher.requests == 0
        assert server.requests == [(0, 0)]


@pytest.mark.parametrize("name", ["data", "map"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_between_sessions(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    """A damaged entry costs requests, never wrong bytes, and the next reading makes it whole."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        damage(entry / name)
        for is_repaired in (False, True):
            with opened(server.url, tmp_path) as file:
                assert read(file, 0, len(CONTENT)) == CONTENT
                assert (file.fetcher.requests == 0) == is_repaired


@pytest.mark.parametrize("name", ["about.json", "", "..", "../.."])
def test_removal_between_sessions(name: str, tmp_path: Path) -> None:
    """A cache of which files or directories were removed is filled again."""
    cache = tmp_path / "cache"
    with serving(CONTENT) as server:
        path = Path(os.path.normpath(fill(server, cache) / name))
        subprocess.run(["rm", "-r", path], check=True)
        for is_repaired in (False, True):
            with opened(server.url, cache) as file:
                assert read(file, 0, len(CONTENT)) == CONTENT
                assert file.fetcher.requests == 0 or not is_repaired


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("entry", marks=pytest.mark.expect_log("Not a directory; going on without a")),
        pytest.param("parent", marks=pytest.mark.expect_log("Not a directory; going on without a")),
    ],
)
def test_something_else_in_the_place_of_a_directory(what: str, tmp_path: Path) -> None:
    """A file where a directory of the cache should be costs only the cache, and is left alone."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        path = entry if what == "entry" else entry.parent
        subprocess.run(["rm", "-r", path], check=True)
        path.write_text("x")
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert path.read_text() == "x"


@pytest.mark.parametrize("unit", [0, 3, UNITS - 1])
@pytest.mark.parametrize("place", ["first", "last", "checksum", "mark"])
def test_flipped_bit(place: str, unit: int, tmp_path: Path) -> None:
    """A flipped bit of data or map costs one request for that unit."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        end = min((unit + 1) * UNIT_BYTES, len(CONTENT))
        if place in {"first", "last"}:
            flip(entry / "data", unit * UNIT_BYTES if place == "first" else end - 1)
        else:
            flip(entry / "map", unit * 8 + (4 if place == "mark" else 0), 128)
        server.requests.clear()
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.fetched_bytes == end - unit * UNIT_BYTES
        assert server.requests[1:] == [(unit * UNIT_BYTES, end - 1)]


def test_units_that_were_exchanged(tmp_path: Path) -> None:
    """A unit with the content and the checksum of another one is not taken for its own."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        data, table = (entry / "data").read_bytes(), (entry / "map").read_bytes()
        data = data[UNIT_BYTES : 2 * UNIT_BYTES] + data[:UNIT_BYTES] + data[2 * UNIT_BYTES :]
        (entry / "data").write_bytes(data)
        (entry / "map").write_bytes(table[8:16] + table[:8] + table[16:])
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 1


@damaged
@pytest.mark.parametrize("way", ["blocking", "async", "try"])
@pytest.mark.parametrize("writer", ["none", "self", "other"])
def test_data_cut_while_it_is_in_use(writer: str, way: str, tmp_path: Path) -> None:
    """Ready units read right after the file was truncated, also if writes made it long again."""
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        assert read(file, 0, 4 * UNIT_BYTES) == CONTENT[: 4 * UNIT_BYTES]
        entry = entry_of(tmp_path)
        with UnitFile.open(str(entry), len(CONTENT)) as other:
            empty(entry / "data")
            if writer == "self":
                read(file, (UNITS - 1) * UNIT_BYTES, 10)
            if writer == "other":
                with suppress(OSError):
                    other.store(UNITS - 1, CONTENT[(UNITS - 1) * UNIT_BYTES :])
        view = memoryview(bytearray(UNIT_BYTES))
        for unit in range(3):
            part = CONTENT[unit * UNIT_BYTES :][:UNIT_BYTES]
            if way == "try" and file.try_read(unit * UNIT_BYTES, view):
                assert bytes(view) == part
            elif way == "async":
                assert trio.run(file.pread, unit * UNIT_BYTES, UNIT_BYTES) == part
            assert read(file, unit * UNIT_BYTES, UNIT_BYTES) == part
        assert read(file, 0, len(CONTENT)) == CONTENT


def flip_on_disk(path: Path) -> None:
    """Flip a bit of a file on its disk."""
    flip(path, 2 * UNIT_BYTES + 70_000)


def punch(path: Path) -> None:
    """Make a hole of one block, as a write that failed can leave it."""
    with path.open("r+b") as file:
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE, 2 * UNIT_BYTES + 65_536, 4096)


def exchange(path: Path) -> None:
    """Replace a block by another one, as a misdirected write does."""
    with path.open("r+b") as file:
        block = os.pread(file.fileno(), 4096, 0)
        os.pwrite(file.fileno(), block, 2 * UNIT_BYTES + 65_536)


ROTS: Final = (flip_on_disk, punch, exchange)


@pytest.mark.parametrize("way", ["blocking", "async", "try"])
@pytest.mark.parametrize("length", [4096, 100_000, UNIT_BYTES, 4 * UNIT_BYTES])
@pytest.mark.parametrize("rot", ROTS)
def test_disk_that_loses_data_in_use(
    rot: Callable[[Path], None], length: int, way: str, tmp_path: Path
) -> None:
    """What rots on the disk while it is in use is fetched again, and no wrong byte is returned."""
    offset = 2 * UNIT_BYTES + 65_536
    if length > UNIT_BYTES:
        offset = UNIT_BYTES + 1
    expected = CONTENT[offset : offset + length]
    with serving(CONTENT) as server:
        fill(server, tmp_path)
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 0
            data = entry_of(tmp_path) / "data"
            rot(data)
            drop_pages(data)
            view = memoryview(bytearray(length))
            for _ in range(20):
                if way == "try" and file.try_read(offset, view):
                    assert view == expected
            if way == "async":
                assert trio.run(file.pread, offset, length) == expected
            assert read(file, offset, length) == expected
            assert file.fetcher.requests == 1
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 1
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 0


@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.expect_log("answers again")
@pytest.mark.parametrize("rot", ROTS)
def test_disk_that_loses_data_without_a_server(rot: Callable[[Path], None], tmp_path: Path) -> None:
    """What rots while the server is out cannot be read, and the rest can."""
    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        data = entry_of(tmp_path) / "data"
        rot(data)
        drop_pages(data)
        server.always = "status 503"
        for _ in range(2):
            with pytest.raises(RemoteError):
                read(file, 2 * UNIT_BYTES + 65_536, 8192)
        for unit in (1, 3):
            part = CONTENT[unit * UNIT_BYTES :][:UNIT_BYTES]
            assert read(file, unit * UNIT_BYTES, UNIT_BYTES) == part
        server.always = None
        assert read(file, 0, len(CONTENT)) == CONTENT


def test_nothing_is_read_ahead_of_the_comparison(tmp_path: Path) -> None:
    """Reads of some units bring no byte of another unit from the disk into the page cache."""
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        data = entry_of(tmp_path) / "data"
        drop_pages(data)
        for unit in range(2):
            assert read(file, unit * UNIT_BYTES, UNIT_BYTES)
        with data.open("rb") as probe:
            os.posix_fadvise(probe.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            with pytest.raises(OSError, match=r"temporarily unavailable|not supported"):
                os.preadv(probe.fileno(), [bytearray(4096)], 2 * UNIT_BYTES, os.RWF_NOWAIT)


@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.parametrize("rot", ROTS)
def test_a_disk_that_answers_within_the_call(
    rot: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that the kernel reads from the disk within the call that missed them do not count."""
    preadv = os.preadv

    def read_from_disk(fd: int, views: list[memoryview], offset: int, _flags: int = 0) -> int:
        return preadv(fd, views, offset)  # as with RWF_NOWAIT, if the disk is fast enough

    with serving(CONTENT) as server, opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        data = entry_of(tmp_path) / "data"
        rot(data)
        drop_pages(data)
        server.always = "status 503"
        monkeypatch.setattr(os, "preadv", read_from_disk)
        assert not file.try_read(2 * UNIT_BYTES + 65_536, memoryview(bytearray(8192)))
        with pytest.raises(RemoteError):
            read(file, 2 * UNIT_BYTES + 65_536, 8192)


@pytest.mark.parametrize("rot", ROTS)
def test_one_reader_brings_nothing_wrong_to_another(
    rot: Callable[[Path], None], tmp_path: Path
) -> None:
    """While several use an entry, bytes that are not intact never get into the page cache."""
    with (
        serving(CONTENT) as server,
        opened(server.url, tmp_path, deadlines=DEADLINES) as one,
        opened(server.url, tmp_path, deadlines=DEADLINES) as two,
    ):
        for file in (one, two):
            assert read(file, 0, len(CONTENT)) == CONTENT
        data = entry_of(tmp_path) / "data"
        size = data.stat().st_size
        assert size == len(CONTENT) + 2
        rot(data)
        drop_pages(data)
        offset = 2 * UNIT_BYTES + 65_536
        with data.open("rb") as probe, closing(Residency(probe.fileno(), size)) as residency:
            view = memoryview(bytearray(UNIT_BYTES))
            for file in (one, two, one):
                assert not file.try_read(offset, view[:8192])
                assert not file.try_read(2 * UNIT_BYTES, view)
            assert not any(residency.has_range(offset + at, 1) for at in range(0, 8192, 4096))
            with UnitFile.open(str(data.parent), len(CONTENT)) as entry:
                assert entry.load(2) is None
                assert not any(residency.has_range(offset + at, 1) for at in range(0, 8192, 4096))
                assert entry.load(3) == CONTENT[3 * UNIT_BYTES : 4 * UNIT_BYTES]
                assert residency.has_range(3 * UNIT_BYTES, UNIT_BYTES)
        for file in (one, two):
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert one.fetcher.requests + two.fetcher.requests > 0


def test_a_disk_that_returns_other_bytes_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong bytes that follow right ones are refused, and dropped from the page cache."""
    make_files(str(tmp_path), len(CONTENT))
    preadv, pread, fadvise, data = os.preadv, os.pread, os.posix_fadvise, tmp_path / "data"
    calls: list[str] = []

    def read_around(fd: int, buffers: list[mmap.mmap], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        flip(data, UNIT_BYTES + 5000)
        drop_pages(data)
        calls.append("around")
        return count

    def read_through(fd: int, length: int, offset: int) -> bytes:
        content = pread(fd, length, offset)
        if length == UNIT_BYTES:
            assert residency.has_range(UNIT_BYTES, UNIT_BYTES)
            calls.append("through")
        return content

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        fadvise(fd, offset, length, advice)
        if (offset, length, advice) == (UNIT_BYTES, UNIT_BYTES, os.POSIX_FADV_DONTNEED):
            calls.append("drop")

    with (
        UnitFile.open(str(tmp_path), len(CONTENT)) as entry,
        UnitFile.open(str(tmp_path), len(CONTENT)),
        closing(Residency(entry.data_fd, len(CONTENT) + 2)) as residency,
    ):
        entry.store(0, CONTENT)
        drop_pages(data)
        if entry._direct_fd < 0:
            pytest.skip("the file system has no O_DIRECT")
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", read_around)
            patched.setattr(os, "pread", read_through)
            patched.setattr(os, "posix_fadvise", advise)
            assert entry.load(1) is None
        assert calls == ["around", "through", "drop"]


def test_length_says_who_uses_an_entry(tmp_path: Path) -> None:
    """The data has another length while several have it open, which is not taken for damage."""
    version = Version(len(CONTENT), '"one"')
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    lengths = []
    with directory.open_entry(ADDRESS, version) as one:
        data = Path(one.path) / "data"
        lengths.append(data.stat().st_size)
        with directory.open_entry(ADDRESS, version) as two:
            lengths.append(data.stat().st_size)
            for unit, entry in enumerate((one, two)):
                entry.store(unit, CONTENT[unit * UNIT_BYTES :][:UNIT_BYTES])
        lengths.append(data.stat().st_size)
    with directory.open_entry(ADDRESS, version) as one:
        lengths.append(data.stat().st_size)
        assert one.has_units(b"\1\1")
        assert not one.has_units(b"\1", 2)
    assert [length - len(CONTENT) for length in lengths] == [1, 2, 2, 1]


@pytest.mark.expect_log("cannot store in the cache")
def test_a_unit_is_not_ready_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that is stored again has to be found written again, and compared if that failed."""
    seen = []
    make_files(str(tmp_path), len(CONTENT))
    with UnitFile.open(str(tmp_path), len(CONTENT)) as entry:
        units = UnitStore(UNITS, entry, None)
        assert units.store(0, CONTENT[:UNIT_BYTES])
        units.ready[0] = 2
        write = UnitFile.store

        def store(self: UnitFile, unit: int, content: bytes) -> None:
            seen.append(units.ready[unit])
            write(self, unit, content)

        def fail(self: UnitFile, unit: int, content: bytes) -> None:
            store(self, unit, content)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for function, ready in ((store, 1), (fail, 0)):
            monkeypatch.setattr(UnitFile, "store", function)
            assert units.store(0, CONTENT[:UNIT_BYTES]) == bool(ready)
            assert units.ready[0] == ready
            units.ready[0] = 2
        assert seen == [0, 0]


def test_zeros_are_compared(tmp_path: Path) -> None:
    """Blocks of zeros that belong to the object are right, although they look like holes."""
    content = bytes(UNIT_BYTES) + some_bytes(1) + bytes(UNIT_BYTES // 2)
    with serving(content) as server, opened(server.url, tmp_path) as file:
        for _ in range(3):
            assert read(file, 0, len(content)) == content
            assert trio.run(file.pread, 1, len(content)) == content[1:]
        for start in (0, 5, UNIT_BYTES - 5, 2 * UNIT_BYTES - 5):
            assert file.try_read(start, memoryview(bytearray(4096))), "known to be zeros"
        assert file.fetcher.fetched_bytes == len(content)


def test_cache_removed_while_it_is_in_use(tmp_path: Path) -> None:
    """Removal of the whole cache does not disturb those who have it open, nor the next ones."""
    cache = tmp_path / "cache"
    with serving(CONTENT) as server:
        with opened(server.url, cache) as file:
            assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
            subprocess.run(["rm", "-r", cache], check=True)
            with opened(server.url, cache) as other:
                assert read(other, 0, len(CONTENT)) == CONTENT
            assert read(file, 0, len(CONTENT)) == CONTENT
        with opened(server.url, cache) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 0


def test_descriptors_are_closed_after_the_last_read(tmp_path: Path) -> None:
    """A descriptor that a reader uses is not closed under it, and all are closed in the end."""
    descriptors = Path("/proc/self/fd")
    with serving(CONTENT) as server:
        before = len(list(descriptors.iterdir()))
        for _ in range(5):
            with opened(server.url, tmp_path) as file:
                wrong: list[bytes] = []

                def run(file: object = file, wrong: list[bytes] = wrong) -> None:
                    with suppress(RemoteError):
                        while True:
                            found = read(file, 0, len(CONTENT))  # type: ignore[arg-type]
                            if found != CONTENT:
                                wrong.append(found)

                threads = [threading.Thread(target=run) for _ in range(3)]
                for thread in threads:
                    thread.start()
                wait_until(lambda file=file: all(file.fetcher.ready))
                file.close()
                # Files with other content take the numbers of descriptors that are free.
                others = [os.open("/proc/self/exe", os.O_RDONLY) for _ in range(10)]
                for thread in threads:
                    thread.join(20)
                for fd in others:
                    os.close(fd)
                assert not wrong
        wait_until(lambda: len(list(descriptors.iterdir())) <= before + 16)


FILLER: Final = """
import sys
from pathlib import Path
from tests.support.remotes import opened, read
url, cache, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with opened(url, cache) as file:
    print("open", flush=True)
    for offset in range(0, size, 1 << 18):
        read(file, offset, 1 << 18)
        print(offset, flush=True)
"""


def start_filling(url: str, cache: Path) -> Process:
    """Start a process that fills the cache and prints a line for each unit."""
    words = [url, str(cache), str(len(CONTENT))]
    if not forkserver.NEW_INTERPRETERS:
        return forkserver.start(
            FILLER, words, ("tests.support.remotes",), cwd=TREE, stdout=subprocess.PIPE
        )
    return subprocess.Popen(
        [sys.executable, "-c", FILLER, *words], stdout=subprocess.PIPE, cwd=TREE, text=True
    )


def test_kill_while_the_cache_fills(tmp_path: Path) -> None:
    """After SIGKILL of a process that fills the cache the bytes are right, in 20 rounds."""
    kept = 0
    with serving(CONTENT) as server:
        for number in range(20):
            cache = tmp_path / str(number)
            process = start_filling(server.url, cache)
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            for _ in range(number % UNITS):
                process.stdout.readline()
            process.kill()
            process.communicate(timeout=60)
            assert process.returncode in {0, -signal.SIGKILL}
            with opened(server.url, cache) as file:
                assert read(file, 0, len(CONTENT)) == CONTENT
                kept += file.fetcher.fetched_bytes < len(CONTENT)
    assert kept >= 10


def test_processes_fill_one_entry(tmp_path: Path) -> None:
    """Processes that fill one entry at the same time leave it whole."""
    with serving(CONTENT) as server:
        processes = [start_filling(server.url, tmp_path) for _ in range(3)]
        for process in processes:
            process.communicate(timeout=60)
            assert process.returncode == 0
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.requests == 0
        entry_of(tmp_path)


def test_threads_make_and_remove_one_entry(tmp_path: Path) -> None:
    """An entry that is made, opened and removed concurrently is always usable or refused."""
    failures: list[BaseException] = []
    version = Version(len(CONTENT), '"one"')
    block = CONTENT[:UNIT_BYTES]

    def run(number: int) -> None:
        directory = CacheDirectory(CacheOptions(str(tmp_path), 1 if number % 2 else None))
        try:
            for _ in range(60):
                with suppress(CacheError), directory.open_entry(ADDRESS, version) as entry:
                    entry.store(0, block)
                    assert entry.load(0) == block
                directory.evict()
        except BaseException as error:  # noqa: BLE001  reported by the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    with CacheDirectory(CacheOptions(str(tmp_path))).open_entry(ADDRESS, version) as entry:
        entry.store(0, block)
        assert entry.load(0) == block


@from_cache
@pytest.mark.parametrize("outage", ["refused", "status 503", "status 403", "silence"])
def test_complete_entry_without_a_server(outage: str, tmp_path: Path) -> None:
    """A complete entry is read while the server is out or refuses."""
    with serving(CONTENT) as server:
        fill(server, tmp_path)
        if outage != "refused":
            server.always = outage  # type: ignore[assignment]
            with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
                assert read(file, 0, len(CONTENT)) == CONTENT
            assert server.struck[outage] >= 1
            return
    with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    "fault", ["no range", "gzip", "no etag", "redirect elsewhere", "redirect loop", "status 418"]
)
def test_no_entry_instead_of_an_unusable_answer(fault: str, tmp_path: Path) -> None:
    """An answer that cannot be used is no outage: nothing is read from the cache."""
    with serving(CONTENT) as server:
        fill(server, tmp_path)
        server.elsewhere = "https://192.0.2.1/disk.qed"
        server.modified = None
        server.always = fault  # type: ignore[assignment]
        with pytest.raises(RemoteError, match="found") as caught:
            open_remote(parse_address(server.url), options(tmp_path))
        assert "attempts" not in str(caught.value)
        assert server.struck[fault] >= 1


def test_no_entry_instead_of_an_untrusted_server(
    nginx: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with an untrusted certificate is no outage: nothing is read from the cache."""
    (nginx.directory / "trusted.qed").write_bytes(CONTENT)
    url = f"{nginx.https}/trusted.qed"
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    with opened(url, tmp_path) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(RemoteError, match="TLS: certificate: found self-signed"):
        open_remote(parse_address(url), options(tmp_path))


@from_cache
def test_entry_that_others_open_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete entry is read although another process is just opening it."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
    with (entry / "map").open("rb") as file:
        pauses: list[float] = []

        def end_other_opening(seconds: float) -> None:
            assert seconds < 1
            pauses.append(seconds)
            fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr("qedfuse.remote.cachedirectory.time.sleep", end_other_opening)
        fcntl.flock(file, fcntl.LOCK_EX)
        with opened(server.url, tmp_path, deadlines=DEADLINES) as other:
            assert pauses
            assert read(other, 0, len(CONTENT)) == CONTENT


def test_no_entry_instead_of_an_answer(tmp_path: Path) -> None:
    """An object that the server does not have any more is not read from the cache."""
    with serving(CONTENT) as server:
        fill(server, tmp_path)
        server.always = "status 404"
        with pytest.raises(RemoteError, match="no such object") as caught:
            open_remote(parse_address(server.url), options(tmp_path))
        assert caught.value.errno == errno.ENOENT
        assert server.struck["status 404"] == 1


def test_no_incomplete_entry_without_a_server(tmp_path: Path) -> None:
    """An entry that lacks a unit is not used while the server is out."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        flip(entry / "map", 8 * 3 + 4)
        address = parse_address(server.url)
        with opened(server.url, tmp_path) as file:
            size = file.size()
    with pytest.raises(RemoteError, match=f"; the cache has {size} of {size} bytes, too few to"):
        open_remote(address, options(tmp_path))
    (entry / "data").unlink()
    (entry / "data").touch()
    with pytest.raises(RemoteError, match=r"refused \(attempts: [0-9]+\)$"):
        open_remote(address, options(tmp_path))


def test_how_much_the_cache_has_without_a_server(tmp_path: Path) -> None:
    """An error says how much of the object is cached, but nothing of another version."""
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        read(file, 0, UNIT_BYTES)
        address = parse_address(server.url)
        version = (len(CONTENT), str(file.identity[2]))
    note = f"; the cache has {UNIT_BYTES} of {len(CONTENT)} bytes, too few to read it without the"
    for wanted in (None, version):
        with pytest.raises(RemoteError, match=note):
            open_remote(address, options(tmp_path), wanted)
    with pytest.raises(RemoteError, match=r"refused \(attempts: [0-9]+\)$"):
        open_remote(address, options(tmp_path), (len(CONTENT), "etag other"))


@pytest.mark.expect_log("what is not in the cache cannot be read")
@from_cache
def test_damaged_unit_without_a_server(tmp_path: Path) -> None:
    """A damaged unit of an entry that claims to be complete is an error while the server is out."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        flip(entry / "data", 3 * UNIT_BYTES)
    with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        with pytest.raises(RemoteError):
            read(file, 0, len(CONTENT))
        assert read(file, 0, 3 * UNIT_BYTES) == CONTENT[: 3 * UNIT_BYTES]


@pytest.mark.parametrize(
    "about",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": {"size": "x", "etag": "", "modified": null}}',
        b'{"version": {"size": -1, "etag": "", "modified": null}}',
        b'{"version": {"size": 1e400, "etag": "", "modified": null}}',
        b'{"version": {"size": 1, "etag": "", "modified": []}}',
        b"[" * 100_000,
    ],
)
def test_damaged_description(about: bytes, tmp_path: Path) -> None:
    """An entry whose description is damaged is not used while the server is out."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        (entry / "about.json").write_bytes(about)
    with pytest.raises(RemoteError):
        open_remote(parse_address(server.url), options(tmp_path))


@pytest.mark.expect_log("reading it from the cache")
def test_damaged_time(tmp_path: Path) -> None:
    """An entry whose time of the last change is no time is not used while the server is out."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
    about = entry / "about.json"
    text = about.read_text()
    good = ["1000000000.0", "-62135596800", "253402300799.5"]
    bad = [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "1e300",
        "-1e300",
        "1e12",
        "1.5e17",
        "true",
        '"1e9"',
    ]
    for modified in good + bad:
        about.write_text(text.replace('"modified": 1000000000.0', f'"modified": {modified}'))
        assert f'"modified": {modified}' in about.read_text()
        if modified in bad:
            directory = CacheDirectory(CacheOptions(str(tmp_path)))
            assert not list(directory.offline_entries(parse_address(server.url))), modified
            continue
        with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
            assert file.stat().st_mtime == float(modified)


@pytest.mark.parametrize("size", [-1, (16 << 40) + 1, 1 << 70, 10**300])
def test_impossible_size(size: int, tmp_path: Path) -> None:
    """Metadata with a size that no object has are damaged, also if they match the entry's name."""
    version = Version(size, '"one"')
    entry = tmp_path / entry_name(version)
    entry.mkdir()
    about = {"version": asdict(version), "needed": base64.b64encode(zlib.compress(b"")).decode()}
    (entry / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"about\.json"):
        read_metadata(str(entry))


def test_description_of_another_version(tmp_path: Path) -> None:
    """An entry that describes another version than its name does is not used."""
    with serving(CONTENT) as server:
        entry = fill(server, tmp_path)
        path = entry / "about.json"
        assert json.loads(path.read_text())["version"]["etag"] == '"one"'
        path.write_text(path.read_text().replace("one", "two"))
    with pytest.raises(RemoteError):
        open_remote(parse_address(server.url), options(tmp_path))


def options(cache: Path, cache_bytes: int | None = None) -> RemoteOptions:
    """Return options with a cache."""
    return RemoteOptions(cache_directory=str(cache), cache_bytes=cache_bytes, deadlines=DEADLINES)


def make_entry(directory: CacheDirectory, name: str, used: int) -> UnitFile:
    """Make an entry with one unit, last used at a given time."""
    address = parse_address(f"https://host/{name}")
    entry = directory.open_entry(address, Version(UNIT_BYTES, f'"{name}"'))
    entry.store(0, some_bytes(1))
    os.utime(entry.path, (used, used))
    return entry


def test_least_recently_used_entries_are_removed(tmp_path: Path) -> None:
    """Entries are removed in the order of their last use, and none that is open."""
    unlimited = CacheDirectory(CacheOptions(str(tmp_path)))
    names = ("b", "d", "a", "c")
    entries = {name: make_entry(unlimited, name, used) for used, name in enumerate(names)}
    for name in "bac":
        entries[name].close()
    limited = CacheDirectory(CacheOptions(str(tmp_path), 5 * UNIT_BYTES // 2))
    limited.evict()
    assert {name for name in entries if Path(entries[name].path).exists()} == {"d", "c"}
    CacheDirectory(CacheOptions(str(tmp_path), 0)).evict()
    assert {name for name in entries if Path(entries[name].path).exists()} == {"d"}
    assert entries["d"].load(0) == some_bytes(1)
    entries["d"].close()
    CacheDirectory(CacheOptions(str(tmp_path), 0)).evict()
    assert [path.name for path in tmp_path.iterdir()] == ["CACHEDIR.TAG"]


def test_opening_is_a_use(tmp_path: Path) -> None:
    """An entry that was opened is removed later than one that was not."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    paths = {}
    for used, name in enumerate("ab"):
        entry = make_entry(directory, name, used)
        paths[name] = Path(entry.path)
        entry.close()
    directory.open_entry(parse_address("https://host/a"), Version(UNIT_BYTES, '"a"')).close()
    CacheDirectory(CacheOptions(str(tmp_path), 3 * UNIT_BYTES // 2)).evict()
    assert paths["a"].exists()
    assert not paths["b"].exists()


def test_entry_of_another_process_is_kept(tmp_path: Path) -> None:
    """An entry that another process has open is not removed."""
    directory = CacheDirectory(CacheOptions(str(tmp_path), 0))
    entry = make_entry(directory, "a", 0)
    entry.close()
    path = Path(entry.path)
    program = (
        "import sys; from qedfuse.remote.unitfile import UnitFile\n"
        f"e = UnitFile.open(sys.argv[1], {UNIT_BYTES}); print('open', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        directory.evict()
        assert path.exists()
        process.kill()
    directory.evict()
    assert not path.exists()


def remade(directory: CacheDirectory, version: Version) -> UnitFile:
    """Remove the only entry, and make another one at the same path; give it, open."""
    assert directory.evict() == 0
    entry = CacheDirectory(CacheOptions(directory._path)).open_entry(ADDRESS, version)
    entry.store(0, CONTENT[:UNIT_BYTES])
    return entry


def test_an_entry_that_was_made_anew_during_its_removal_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that removes an entry leaves alone another one that was made at the same path."""
    directory = CacheDirectory(CacheOptions(str(tmp_path), 0))
    version = Version(UNIT_BYTES, '"one"')
    CacheDirectory(CacheOptions(str(tmp_path))).open_entry(ADDRESS, version).close()
    open_data, made = cacheentry._open_data, list[UnitFile]()

    def open_slowly(entry: int) -> int:
        fd = open_data(entry)
        if not made:
            made.append(cast("UnitFile", None))  # not again, in the removal by `remade`
            made[0] = remade(directory, version)
        return fd

    monkeypatch.setattr(cacheentry, "_open_data", open_slowly)
    directory.evict()
    with (
        made[0] as entry,
        CacheDirectory(CacheOptions(str(tmp_path))).open_entry(ADDRESS, version) as found,
    ):
        assert os.path.samestat(os.fstat(found.data_fd), os.fstat(entry.data_fd))
        assert found.load(0) == CONTENT[:UNIT_BYTES]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_entry_that_was_made_anew_during_an_open_is_used(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that opens an entry just when it is removed uses the one that replaces it."""
    removing = CacheDirectory(CacheOptions(str(tmp_path), 0))
    directory, version = CacheDirectory(CacheOptions(str(tmp_path))), Version(UNIT_BYTES, '"one"')
    directory.open_entry(ADDRESS, version).close()
    made = list[UnitFile]()

    def remake() -> None:
        if not made:
            made.append(cast("UnitFile", None))  # not again, in the open by `remade`
            made[0] = remade(removing, version)

    flock, open_in = fcntl.flock, UnitFile.open_in

    def lock_slowly(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_SH:
            remake()  # the data file is open
        flock(fd, operation)

    def open_slowly(entry: int, path: str, size: int) -> UnitFile:
        remake()  # only the directory is open
        return open_in(entry, path, size)

    if moment == "after":
        monkeypatch.setattr(fcntl, "flock", lock_slowly)
    else:
        monkeypatch.setattr(UnitFile, "open_in", open_slowly)
    with directory.open_entry(ADDRESS, version) as found, made[0] as entry:
        assert os.path.samestat(os.fstat(found.data_fd), os.fstat(entry.data_fd))
        assert found.load(0) == CONTENT[:UNIT_BYTES]


def test_what_a_crash_has_left_is_removed(tmp_path: Path) -> None:
    """A directory in which an entry was being made is removed if that was a while ago."""
    directory = CacheDirectory(CacheOptions(str(tmp_path), 0))
    make_entry(directory, "a", 0).close()
    (parent,) = tmp_path.glob("object-*")
    old, new = parent / f"new-{0:032x}", parent / f"new-{1:032x}"
    for path in (old, new):
        path.mkdir()
        make_files(str(path), UNIT_BYTES)
    os.utime(old, (0, 0))
    directory.evict()
    assert list(parent.iterdir()) == [new]


@pytest.mark.expect_log("cannot store in the cache: no room is left")
def test_limit_with_one_entry_in_use(tmp_path: Path) -> None:
    """The only entry does not grow over the limit while it is in use; what is read is right."""
    limit = 3 * UNIT_BYTES
    with serving(CONTENT) as server, opened(server.url, tmp_path, cache_bytes=limit) as file:
        for _ in range(2):
            assert read(file, 0, len(CONTENT)) == CONTENT
        data = entry_of(tmp_path) / "data"
        assert 0 < data.stat().st_blocks * 512 <= limit


@pytest.mark.expect_log("cannot store in the cache: no room is left")
def test_no_room_at_all(tmp_path: Path) -> None:
    """With a limit of no bytes nothing is stored."""
    with serving(CONTENT) as server, opened(server.url, tmp_path, cache_bytes=0) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert (entry_of(tmp_path) / "data").stat().st_blocks == 0


@pytest.mark.expect_log("cannot store in the cache: No space left on device")
def test_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write to the cache that fails costs the cache only, and is logged once."""
    pwritev = os.pwritev
    failed: list[int] = []

    def fail(fd: int, parts: list[memoryview], offset: int) -> int:
        if sum(map(len, parts)) > 8 and len(failed) < 3:
            failed.append(offset)
            pwritev(fd, [parts[0][:1000]], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(fd, parts, offset)

    with serving(CONTENT) as server:
        monkeypatch.setattr(os, "pwritev", fail)
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert len(failed) == 3
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_directory_that_others_can_write_to(mode: int, tmp_path: Path) -> None:
    """A directory that other users can change is refused, and nothing is written there."""
    tmp_path.chmod(mode)
    with pytest.raises(CacheError, match="write access for others"):
        CacheDirectory(CacheOptions(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner")
def test_directory_of_another_user(tmp_path: Path) -> None:
    """A directory of another user is refused; so is an entry whose file is another user's."""
    version = Version(UNIT_BYTES, '"one"')
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    entry = directory.open_entry(ADDRESS, version)
    entry.store(0, some_bytes(1))
    entry.close()
    os.chown(Path(entry.path) / "data", 65534, 65534)
    with directory.open_entry(ADDRESS, version) as entry:
        assert entry.load(0) is None
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(CacheError, match="another owner"):
        CacheDirectory(CacheOptions(str(tmp_path)))


def test_directory_that_is_none(tmp_path: Path) -> None:
    """A file in the place of the directory is refused with its name."""
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(CacheError, match="file: cache directory: File exists"):
        CacheDirectory(CacheOptions(str(path)))
    with pytest.raises(CacheError, match="file/x: cache directory: Not a directory"):
        CacheDirectory(CacheOptions(str(path / "x")))


def test_files_are_private(tmp_path: Path) -> None:
    """No other user can read what is cached, whatever the umask is."""
    cache = tmp_path / "cache"
    before = os.umask(0)
    try:
        with serving(CONTENT) as server:
            fill(server, cache)
    finally:
        os.umask(before)
    assert not [path for path in (cache, *cache.rglob("*")) if path.stat().st_mode & 0o077]


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default directory follows XDG_CACHE_HOME if that is absolute, else the home."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_directory() == "/cache/qedfuse"
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", "/home/user")
    assert default_directory() == "/home/user/.cache/qedfuse"
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(CacheError, match="no home directory"):
        default_directory()


def test_secret_query_is_not_on_disk(tmp_path: Path) -> None:
    """The query of a URL is written nowhere in the cache."""
    with serving(CONTENT) as server:
        with opened(server.url + "?token=SECRET", tmp_path) as file:
            assert read(file, 0, 10) == CONTENT[:10]
        for path in tmp_path.rglob("*"):
            assert "SECRET" not in str(path)
            assert not path.is_file() or b"SECRET" not in path.read_bytes()


def test_entries_of_versions_are_apart(tmp_path: Path) -> None:
    """Each version of an object has an entry of its own, and each sees its own bytes."""
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        server.content, server.etag = some_bytes(UNITS, seed=2), '"two"'
        with opened(server.url, tmp_path) as other:
            assert read(other, 0, len(server.content)) == server.content
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert len(list(tmp_path.glob("object-*/version-*"))) == 2


def test_entry_that_is_being_removed_is_busy(tmp_path: Path) -> None:
    """An entry that another process holds alone is refused after a while, and is not touched."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    version = Version(UNIT_BYTES, '"one"')
    with directory.open_entry(ADDRESS, version) as entry:
        path = Path(entry.path)
    with (path / "data").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="temporarily unavailable"):
            directory.open_entry(ADDRESS, version)
        assert path.exists()
    directory.open_entry(ADDRESS, version).close()


def test_descriptor_stays_open_during_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close during a read takes effect when the read has returned; later reads fail."""
    make_files(str(tmp_path), UNIT_BYTES)
    with UnitFile.open(str(tmp_path), UNIT_BYTES) as entry:
        entry.store(0, some_bytes(1))
        local = LocalData(entry)
    descriptors: list[int] = []

    def read_and_close(fd: int, views: tuple[memoryview], offset: int, _flags: int) -> int:
        descriptors.append(fd)
        local.close()
        views[0][:] = os.pread(fd, len(views[0]), offset)
        return len(views[0])

    monkeypatch.setattr(os, "preadv", read_and_close)
    local.is_readable = True
    buffer = bytearray(UNIT_BYTES)
    assert local.try_read(0, memoryview(buffer), ZeroBlocks(1))
    assert buffer == some_bytes(1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
    assert not local.try_read(0, memoryview(buffer), ZeroBlocks(1))
    assert len(descriptors) == 1


@pytest.mark.parametrize("refused", ["inline_flags", "waits_for_server", "Residency"])
def test_a_failed_open_leaves_nothing(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a call at the opening of the data file fails, no descriptor and no mapping stays."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def in_use() -> tuple[int, int]:
        mappings = Path("/proc/self/maps").read_text().count(str(tmp_path))
        return len([*Path("/proc/self/fd").iterdir()]), mappings

    make_files(str(tmp_path), UNIT_BYTES)
    with UnitFile.open(str(tmp_path), UNIT_BYTES) as entry:
        before = in_use()
        monkeypatch.setattr(localdata, refused, refuse)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            LocalData(entry)
        assert in_use() == before
        monkeypatch.undo()
        local = LocalData(entry)
        assert in_use() == (before[0] + 1, before[1] + 1)
        local.close()
        assert in_use() == before


def test_errors_of_a_close_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If close(2) fails, as on a full NFS server, all files are closed and the lock is released."""
    close = os.close

    def close_with_error(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    descriptors = Path("/proc/self/fd")
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        path = entry_of(tmp_path)

        def open_files() -> list[str]:
            found = []
            for link in descriptors.iterdir():
                with suppress(OSError):
                    found.append(str(link.readlink()))
            return [name for name in found if name.startswith(str(path))]

        assert len(open_files()) == 4  # the data three times, and the map
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close_with_error)
            file.stop_fetching()
            assert open_files() == [str(path / "data")]  # of `LocalData`
            file.close()
        assert not open_files()
    with path.joinpath("data").open() as data:
        fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_entry_that_replaces_a_damaged_one_during_its_renaming_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes that discard a damaged entry, one does not rename the other's new entry."""
    directory, version = CacheDirectory(CacheOptions(str(tmp_path))), Version(UNIT_BYTES, '"one"')
    directory.open_entry(ADDRESS, version).close()
    path = entry_of(tmp_path)
    new_path, made = cacheentry._new_path, list[UnitFile]()

    def replace(parent: str) -> str:
        monkeypatch.undo()
        path.rename(new_path(parent))
        made.append(directory.open_entry(ADDRESS, version))
        return new_path(parent)

    monkeypatch.setattr(cacheentry, "_new_path", replace)
    damaged = open_directory(str(path))
    with pytest.raises(BlockingIOError):
        discard_entry(str(path), damaged)
    os.close(damaged)
    with made[0] as entry, directory.open_entry(ADDRESS, version) as found:
        assert os.path.samestat(os.fstat(found.data_fd), os.fstat(entry.data_fd))


def test_space_of_a_cache_after_a_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a close, the attributes are those at the start, and no descriptor is used."""
    make_files(str(tmp_path), UNIT_BYTES)
    with UnitFile.open(str(tmp_path), UNIT_BYTES) as entry:
        local = LocalData(entry)
    descriptors: list[int] = []
    fstatvfs = os.fstatvfs

    def recorded(fd: int) -> os.statvfs_result:
        local.close()
        descriptors.append(fd)
        return fstatvfs(fd)  # the close waits for this call

    monkeypatch.setattr(os, "fstatvfs", recorded)
    assert local.statvfs().f_blocks
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
    assert local.statvfs().f_blocks
    assert len(descriptors) == 1
