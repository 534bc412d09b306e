"""The directory of the cache: it touches nothing that is not its own, and knows stores apart."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.errors import CacheError, RemoteError
from qedfuse.remote import cachedirectory, cachemetadata, cacheroot, cachespace, localdata
from qedfuse.remote.address import parse_address
from qedfuse.remote.cachedirectory import CacheDirectory, CacheOptions
from qedfuse.remote.cachemetadata import mark_usable_offline, read_metadata
from qedfuse.remote.cachespace import CacheSpace
from qedfuse.remote.client import ClientOptions, Version
from qedfuse.remote.object import make_client
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.storevariables import read_key_file
from qedfuse.remote.unitfile import UNIT_BYTES, make_files
from qedfuse.remote.webclient import WebClient
from tests.support.openfiles import open_files
from tests.support.remotes import DEADLINES, PATIENT, opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT: Final = some_bytes(5.5)
ADDRESS: Final = parse_address("https://host/disk.qed")
VERSION: Final = Version(UNIT_BYTES, '"one"')
HASH: Final = "0123456789abcdef" * 2
TAG: Final = "CACHEDIR.TAG"

from_cache = pytest.mark.expect_log("reading it from the cache")


def tree(path: Path) -> dict[str, tuple[object, ...]]:
    """Return what lies below a directory: kinds, modes, contents and targets."""
    found: dict[str, tuple[object, ...]] = {}
    for each in sorted(path.rglob("*")):
        status = each.lstat()
        content: object = None
        if each.is_symlink():
            content = each.readlink()
        elif each.is_file():
            content = each.read_bytes()
        found[str(each.relative_to(path))] = (status.st_mode, status.st_ino, content)
    return found


def make_old(path: Path) -> None:
    """Let everything below a directory, and the directory, seem to be from 1970."""
    for each in (*path.rglob("*"), path):
        os.utime(each, (1, 1), follow_symlinks=False)


def put_others(path: Path, outside: Path) -> None:
    """Put files, directories and links into a directory, some with names like those of a cache."""
    outside.mkdir(exist_ok=True)
    (outside / "precious").write_text("x")
    like_an_entry = outside / f"version-{HASH}"
    like_an_entry.mkdir(exist_ok=True)
    (like_an_entry / "data").write_text("x")
    (path / "documents" / "letters").mkdir(parents=True)
    (path / "documents" / "letters" / "letter").write_text("x")
    (path / "file").write_text("x")
    (path / HASH / HASH).mkdir(parents=True)
    make_files(str(path / HASH / HASH), UNIT_BYTES)
    (path / "new-0").mkdir()
    (path / f"new-{HASH}").mkdir()
    (path / f"new-{HASH}" / "data").write_text("x")
    (path / f"version-{HASH}").mkdir()
    (path / f"object-{HASH[::-1]}").symlink_to(outside, target_is_directory=True)
    (path / f"object-{HASH.upper()}").mkdir()
    (path / "link").symlink_to(outside, target_is_directory=True)
    os.mkfifo(path / "fifo")
    make_old(path)


def full(_path: object) -> os.statvfs_result:
    """Return the attributes of a file system that is full."""
    return os.statvfs_result((4096, 4096, 1000, 0, 0, 100, 10, 10, 0, 255))


@pytest.mark.parametrize(
    "content", [b"", b"Signature: 8a47", bytes(96)], ids=["empty", "short", "zeros"]
)
def test_the_mark_of_a_cache_is_repaired(content: bytes, tmp_path: Path) -> None:
    """A mark that a crash has truncated is written again, so later files change nothing."""
    directory = str(tmp_path / "cache")
    assert cacheroot.prepare_directory(directory) == directory
    mark = tmp_path / "cache" / TAG
    whole = mark.read_bytes()
    mark.write_bytes(content)
    assert cacheroot.prepare_directory(directory) == directory
    assert mark.read_bytes() == whole
    (tmp_path / "cache" / "file").write_text("x")
    assert cacheroot.prepare_directory(directory) == directory


def test_the_mark_of_another_program_is_kept(tmp_path: Path) -> None:
    """A mark with another content is not overwritten."""
    (tmp_path / TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# Others.\n")
    before = tree(tmp_path)
    assert cacheroot.prepare_directory(str(tmp_path)) == str(tmp_path)
    assert tree(tmp_path) == before


@pytest.fixture(params=["limit", "full disk"])
def evict(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], None]:
    """Return a function that removes all of a cache, for one reason or another."""

    def remove_all(path: Path) -> None:
        limit = 0 if request.param == "limit" else None
        if limit is None:
            monkeypatch.setattr(os, "statvfs", full)
        directory = CacheDirectory(CacheOptions(str(path), limit))
        for _ in range(2):
            assert directory.evict() == 0

    return remove_all


def store_one(path: Path) -> Path:
    """Store a unit in the cache at a path; return the directory of its entry."""
    with CacheDirectory(CacheOptions(str(path))).open_entry(ADDRESS, VERSION) as entry:
        entry.store(0, some_bytes(1))
        return Path(entry.path)


def test_other_files_of_the_named_directory(evict: Callable[[Path], None], tmp_path: Path) -> None:
    """In a directory with other content the cache is a subdirectory; nothing else is touched."""
    path = tmp_path / "named"
    path.mkdir()
    put_others(path, tmp_path / "outside")
    before, outside = tree(path), tree(tmp_path / "outside")
    entry = store_one(path)
    assert entry.parent.parent == path / "qedfuse"
    evict(path)
    assert not entry.exists()
    subprocess.run(["rm", "-r", path / "qedfuse"], check=True)
    assert tree(path) == before
    assert tree(tmp_path / "outside") == outside


def test_other_files_inside_the_cache(evict: Callable[[Path], None], tmp_path: Path) -> None:
    """Files that others put into the directory of the cache, or into an entry, are not touched."""
    path = tmp_path / "cache"
    entry = store_one(path)
    put_others(path, tmp_path / "outside")
    put_others(entry.parent, tmp_path / "outside")
    for name in (f"new-{HASH}", f"version-{HASH}"):  # these are names of entries there
        (entry.parent / name).rename(entry.parent / f"{name}0")
    (entry.parent / f"version-{HASH}").symlink_to(tmp_path / "outside" / f"version-{HASH}")
    (entry / "notes").write_text("x")
    make_old(path)
    with CacheDirectory(CacheOptions(str(path))).open_entry(
        ADDRESS, Version(UNIT_BYTES, '"two"')
    ) as other:
        other.store(0, some_bytes(1))
        second = Path(other.path)
    assert second.parent == entry.parent
    before = tree(path)
    evict(path)
    after = tree(path)
    gone = {name for name in before if name not in after}
    assert gone == {name for name in before if str(path / name).startswith(str(second))}
    assert {name: after[name] for name in after} == {name: before[name] for name in after}
    assert (tmp_path / "outside" / f"version-{HASH}" / "data").read_text() == "x"


@pytest.mark.expect_log("no room is left")
def test_other_files_survive_readers(tmp_path: Path) -> None:
    """A reader whose cache is limited, in a directory with other files, removes none of them."""
    path = tmp_path / "named"
    path.mkdir()
    put_others(path, tmp_path / "outside")
    before = tree(path)
    with serving(CONTENT) as server:
        for limit in (UNIT_BYTES, 3 * UNIT_BYTES, 20 * UNIT_BYTES):
            server.etag = f'"{limit}"'
            with opened(server.url, path, cache_bytes=limit) as file:
                assert read(file, 0, len(CONTENT)) == CONTENT
    after = tree(path)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("what", ["files", "file", "link", "writable"])
def test_subdirectory_that_cannot_be_used(what: str, tmp_path: Path) -> None:
    """A subdirectory that is not the cache's either is refused with its name."""
    (tmp_path / "other").write_text("x")
    path = tmp_path / "qedfuse"
    expected = "found other files"
    if what == "file":
        path.write_text("x")
        expected = "Not a directory"
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to("elsewhere")
        expected = "Not a directory"
    else:
        path.mkdir()
        if what == "files":
            (path / "x").write_text("x")
        else:
            path.chmod(0o770)
            expected = "write access for others"
    with pytest.raises(CacheError, match=f"qedfuse: cache directory: .*{expected}"):
        CacheDirectory(CacheOptions(str(tmp_path)))


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "link"])
@pytest.mark.parametrize("has_others", [False, True])
def test_mark(damage: str, has_others: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A cache is known by its mark, or else by having nothing but what a cache has."""
    path = tmp_path / "cache"
    entry = store_one(path)
    assert (path / TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    if has_others:
        (path / "other").write_text("x")
    assert store_one(path) == entry
    (path / TAG).unlink()
    if damage == "link":
        (tmp_path / "tag").write_text("x")
        (path / TAG).symlink_to(tmp_path / "tag")
    elif damage != "missing":
        (path / TAG).write_text("" if damage == "cut" else "something else")
    is_used = not has_others and damage != "link"
    assert (store_one(path) == entry) == is_used
    if damage == "link":
        assert (tmp_path / "tag").read_text() == "x"


def test_directories_are_private(tmp_path: Path) -> None:
    """The subdirectory of the cache is private whatever the umask is."""
    (tmp_path / "other").write_text("x")
    before = os.umask(0)
    try:
        store_one(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "qedfuse").stat().st_mode) == 0o700


def test_concurrent_first_use(tmp_path: Path) -> None:
    """Processes that make the directory at the same time use the same one."""
    found: list[Path] = []

    def run(number: int) -> None:
        found.append(store_one(tmp_path / str(number)))

    for number in range(20):
        found.clear()
        threads = [threading.Thread(target=run, args=(number,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 4
        assert len(set(found)) == 1


def variables(**values: str) -> ClientOptions:
    """Return options with variables of stores."""
    return ClientOptions(credentials=tuple(values.items()))


@pytest.mark.usefixtures("bare_environment")
def test_places_of_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is known by its endpoint or account, from a file or the environment."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "SECRET"}
    places = []
    for endpoint in ("https://one", "https://two"):
        client = make_client(
            parse_address("s3://images/disk.qed"), variables(AWS_ENDPOINT_URL=endpoint, **keys)
        )
        places.append(client.store_id)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://three")
    places.append(make_client(parse_address("s3://images/disk.qed"), variables(**keys)).store_id)
    for account in ("one", "two"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", account)
        places.append(make_client(parse_address("az://images/disk.qed"), ClientOptions()).store_id)
    assert len(set(places)) == 5
    assert not [place for place in places if "SECRET" in place]
    assert make_client(ADDRESS, ClientOptions()).store_id == ""


def test_entries_of_stores_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of one store is not used for the same URL of another store that is out."""
    place = "one"
    monkeypatch.setattr(WebClient, "store_id", property(lambda _: place))
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
        url = server.url
    place = "two"
    with pytest.raises(RemoteError):
        open_remote(
            parse_address(url), RemoteOptions(cache_directory=str(tmp_path), deadlines=DEADLINES)
        )


@pytest.mark.expect_log("found units missing, expected all units")
@from_cache
def test_entry_that_suffices_without_a_server(tmp_path: Path) -> None:
    """An entry that was recorded as sufficient is used while it has the units that are needed.

    Other units in their place do not suffice, and nothing is recorded while a unit is missing.
    """
    needed = b"\0\1\1\0\0\0"
    with serving(CONTENT) as server:
        with opened(server.url, tmp_path) as file:
            assert read(file, UNIT_BYTES, 2 * UNIT_BYTES) == CONTENT[UNIT_BYTES : 3 * UNIT_BYTES]
            assert not file.fetcher.is_stored(5, 5)
            (entry,) = tmp_path.glob("object-*/version-*")
            assert not file.fetcher.mark_usable_offline(b"\0\1\1\0\0\1")
            assert file.fetcher.mark_usable_offline(needed)
        with opened(server.url, tmp_path) as file:
            assert file.fetcher.mark_usable_offline(needed), "it can be recorded twice"
        url = server.url
    with opened(url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, UNIT_BYTES, 2 * UNIT_BYTES) == CONTENT[UNIT_BYTES : 3 * UNIT_BYTES]
    with (entry / "map").open("r+b") as table:
        table.seek(8)
        table.write(bytes(8))
        table.seek(40)
        table.write(struct.pack("<II", 0, 0x51454455))
    with pytest.raises(RemoteError):
        open_remote(
            parse_address(url), RemoteOptions(cache_directory=str(tmp_path), deadlines=DEADLINES)
        )


def test_another_entry_of_the_same_name(tmp_path: Path) -> None:
    """That an entry suffices is not recorded in another one that has its name meanwhile."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    with directory.open_entry(ADDRESS, VERSION) as entry:
        shutil.rmtree(entry.path)
        with pytest.raises(CacheError, match="No such file"):
            mark_usable_offline(entry, b"\0")
        with directory.open_entry(ADDRESS, VERSION) as other:
            assert other.path == entry.path
            with pytest.raises(CacheError, match="found another entry of this name"):
                mark_usable_offline(entry, b"\0")
            assert not list(directory.offline_entries(ADDRESS))
            mark_usable_offline(other, b"\0")
        ((_, found),) = directory.offline_entries(ADDRESS)
        found.close()


def test_two_processes_record_concurrently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process writes its record, another one replaces ``about.json`` by a complete file."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    real_rename, real_write = os.rename, cachemetadata._write_file
    renames: list[Callable[[], None]] = []
    found: list[bytes | None] = []

    def write(fd: int, name: str, content: bytes) -> None:
        if renames:  # the second process has made its file, but has written nothing yet
            real_write(fd, name, b"")
            renames.pop()()
            found.append(read_metadata(entry.path).needed)
            os.unlink(name, dir_fd=fd)
        real_write(fd, name, content)

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        def call() -> None:
            real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        if found:
            call()
        else:
            renames.append(call)
            mark_usable_offline(entry, b"\0")
            assert not renames

    with directory.open_entry(ADDRESS, VERSION) as entry:
        entry.store(0, some_bytes(1))
        monkeypatch.setattr(cachemetadata, "_write_file", write)
        monkeypatch.setattr(os, "rename", rename)
        mark_usable_offline(entry, b"\1")
        assert found == [b"\1"], "the first record was complete beside the second one"
        assert read_metadata(entry.path).needed == b"\0"
        assert {each.name for each in Path(entry.path).iterdir()} == {"about.json", "data", "map"}


@pytest.mark.parametrize(("age", "is_kept"), [(0, True), (7200, False)])
def test_record_that_a_killed_process_has_begun(
    evict: Callable[[Path], None], age: float, *, is_kept: bool, tmp_path: Path
) -> None:
    """The next record removes the unfinished one if it is old; the eviction removes it anyhow."""
    entry = store_one(tmp_path)
    new = entry / f"about-{HASH}.new"
    new.write_bytes(b"{")
    os.utime(new, times=(time.time() - age,) * 2)
    with CacheDirectory(CacheOptions(str(tmp_path))).open_entry(ADDRESS, VERSION) as file:
        mark_usable_offline(file, b"\1")
    assert new.exists() == is_kept
    evict(tmp_path)
    assert not entry.exists()


def test_metadata_that_are_a_directory(tmp_path: Path) -> None:
    """A directory in the place of ``about.json``, or of a key, is an error without a leak."""
    entry = store_one(tmp_path)
    about = entry / "about.json"
    about.unlink()
    about.mkdir()
    before = open_files(os.getpid())
    with pytest.raises(IsADirectoryError):
        read_metadata(str(entry))
    with pytest.raises(IsADirectoryError):
        read_key_file(str(about))
    assert open_files(os.getpid()) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about.write_bytes(b""),
        lambda about: about.write_text(json.dumps({"version": {"size": 1}})),
        lambda about: about.unlink(),
        lambda about: (about.unlink(), about.symlink_to("data")),
    ],
    ids=["empty", "another version", "missing", "a link"],
)
def test_damaged_metadata_are_written_again(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    """An opening repairs the metadata of an entry and keeps its units; valid metadata stay."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    content = some_bytes(1)
    with directory.open_entry(ADDRESS, VERSION) as entry:
        entry.store(0, content)
        mark_usable_offline(entry, b"\1")
        about = Path(entry.path, "about.json")
    recorded = about.read_bytes()
    with directory.open_entry(ADDRESS, VERSION):
        assert about.read_bytes() == recorded
    damage(about)
    with directory.open_entry(ADDRESS, VERSION) as entry:
        assert entry.has_units(None)
        assert read_metadata(entry.path) == (VERSION, None)
        assert json.loads(about.read_bytes())["url"] == ADDRESS.shown
        assert not about.is_symlink()


def test_needed_units_without_a_pattern(tmp_path: Path) -> None:
    """The record of needed units all over an object of 1.25 TiB is read back."""
    directory = CacheDirectory(CacheOptions(str(tmp_path)))
    version = Version(5 << 38, '"one"')
    units = version.size // UNIT_BYTES
    bits = int.from_bytes(random.Random(1).randbytes(units // 8), "big")
    needed = f"{bits:0{units}b}".encode().translate(bytes.maketrans(b"01", b"\0\1"))
    with directory.open_entry(ADDRESS, version) as entry:
        Path(entry.path, "map").write_bytes(struct.pack("<II", 0, 0x51454455) * units)
        mark_usable_offline(entry, needed)
        assert read_metadata(entry.path) == (version, needed)
    assert Path(entry.path, "about.json").stat().st_size > 1 << 20, "longer than the former limit"


@pytest.mark.expect_log("about.json: found 158 bytes, expected at most 154")
@from_cache
def test_record_that_would_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A record at the limit is written and read; a longer one is refused, and the old one stays."""
    with serving(CONTENT) as server:
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert file.fetcher.mark_usable_offline(b"\1" * 6)
            (about,) = tmp_path.glob("object-*/version-*/about.json")
            recorded = about.read_bytes()
            monkeypatch.setattr(cachemetadata, "_MAX_BYTES", len(recorded))
            assert file.fetcher.mark_usable_offline(b"\1" * 6)
            assert not caplog.records
            assert not file.fetcher.mark_usable_offline(b"\0\1\1\0\1\0")
            (record,) = caplog.records
            found = record.getMessage()
            assert f"{about.parent}: about.json: found " in found
            assert f"bytes, expected at most {len(recorded)}; not recorded as usable" in found
            assert about.read_bytes() == recorded
        with opened(server.url, tmp_path):
            pass
    with opened(server.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    monkeypatch.setattr(cachemetadata, "_MAX_BYTES", len(recorded) - 1)
    with pytest.raises(RemoteError):
        open_remote(
            parse_address(server.url),
            RemoteOptions(cache_directory=str(tmp_path), deadlines=DEADLINES),
        )


@pytest.mark.expect_log("found damaged metadata")
def test_no_record_beside_damaged_metadata(tmp_path: Path) -> None:
    """Nothing is recorded in an entry whose metadata are damaged; the log says why."""
    with serving(CONTENT) as server, opened(server.url, tmp_path) as file:
        (about,) = tmp_path.glob("object-*/version-*/about.json")
        about.write_bytes(b"{")
        assert not file.fetcher.mark_usable_offline(bytes(6))
        assert about.read_bytes() == b"{"


@from_cache
@pytest.mark.parametrize("outage", ["status 503", "silence"])
def test_opening_without_a_server_is_quick(outage: str, tmp_path: Path) -> None:
    """If the cache has all that is needed, an outage delays an opening by no more than a moment."""
    with serving(CONTENT) as server:
        with opened(server.url, tmp_path) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        server.always = outage  # type: ignore[assignment]
        begin = time.monotonic()
        deadlines = Deadlines(connect_seconds=0.5, attempt_seconds=1.0, total_seconds=600.0)
        with opened(server.url, tmp_path, deadlines=deadlines) as file:
            assert time.monotonic() - begin < 30
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert server.struck[outage] >= 1


@pytest.mark.expect_log("found a network file system; going on without a cache")
def test_default_directory_on_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default directory is not used if its files are on a server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cacheroot, "waits_for_server", lambda _: True)
    with serving(CONTENT) as server:
        file = open_remote(parse_address(server.url), RemoteOptions(deadlines=PATIENT))
        try:
            assert read(file, 0, len(CONTENT)) == CONTENT
        finally:
            file.close()
    assert not list(tmp_path.rglob("object-*"))


def test_named_directory_on_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory on a server only threads of the fetcher read, and compare all they read."""
    monkeypatch.setattr(cacheroot, "waits_for_server", lambda _: True)
    monkeypatch.setattr(localdata, "waits_for_server", lambda _: True)

    def refuse(*_: object) -> int:
        raise AssertionError

    with serving(CONTENT) as server:
        for is_cached in (False, True):
            with opened(server.url, tmp_path) as file:
                monkeypatch.setattr(os, "preadv", refuse)
                for _ in range(2):
                    assert read(file, 0, len(CONTENT)) == CONTENT
                    assert trio.run(file.pread, 5, len(CONTENT)) == CONTENT[5:]
                    assert not file.try_read(0, memoryview(bytearray(10)))
                assert file.page_source is None
                assert (file.fetcher.requests == 0) == is_cached
                assert file.fetcher.fetched_bytes in {0, len(CONTENT)}


def test_removed_directory_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader stores what it fetches also after the whole cache was removed."""
    monkeypatch.setattr(cachedirectory, "_MAX_GRANT_BYTES", UNIT_BYTES)
    path = tmp_path / "cache"
    with serving(CONTENT) as server, opened(server.url, path) as file:
        assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
        subprocess.run(["rm", "-r", path], check=True)
        for unit in reversed(range(6)):  # one by one, because nothing is read ahead
            assert read(file, unit * UNIT_BYTES, UNIT_BYTES)
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert file.fetcher.is_stored(0, 5)
        assert file.fetcher.fetched_bytes == len(CONTENT)
        assert (path / TAG).exists()


@pytest.mark.expect_log("no room is left")
def test_removed_files_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader has open counts against the limit also after its removal from the cache."""
    monkeypatch.setattr(cachedirectory, "_MAX_GRANT_BYTES", UNIT_BYTES)
    path = tmp_path / "cache"
    limit = 3 * UNIT_BYTES
    with serving(CONTENT) as server, opened(server.url, path, cache_bytes=limit) as file:
        assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
        (data,) = path.rglob("data")
        with data.open("rb") as kept:
            subprocess.run(["rm", "-r", path], check=True)
            assert read(file, 0, len(CONTENT)) == CONTENT
            assert 0 < os.fstat(kept.fileno()).st_blocks * 512 <= limit


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid to make a directory, as the sandbox of a mount does outside of the cache."""

    def fail(path: str, **_: object) -> None:
        if not os.path.lexists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "makedirs", fail)


def test_a_deleted_cache_that_cannot_be_made_again(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units are stored in the removed files of an open entry, and count against the limit."""
    monkeypatch.setattr(cachedirectory, "_MAX_GRANT_BYTES", UNIT_BYTES)
    path = tmp_path / "cache"
    with serving(CONTENT) as server, opened(server.url, path) as file:
        assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
        shutil.rmtree(path)
        request.getfixturevalue("forbidden")
        monkeypatch.setattr(cachedirectory, "_MAX_GRANT_BYTES", 8 * UNIT_BYTES)
        assert read(file, 0, len(CONTENT)) == CONTENT
        assert file.fetcher.is_stored(0, 5)
        assert not path.exists()


@pytest.mark.parametrize(("limit", "granted"), [(3, 2), (2, 1), (1, 0), (0, 0)])
def test_limit_of_a_deleted_cache(
    limit: int, granted: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The space that an open entry takes up counts also if the cache cannot be made again."""
    path = tmp_path / "cache"
    directory = CacheDirectory(CacheOptions(str(path), limit * UNIT_BYTES))
    with directory.open_entry(ADDRESS, VERSION) as entry:
        entry.store(0, some_bytes(1))
        shutil.rmtree(path)
        request.getfixturevalue("forbidden")
        assert directory.evict(entry) == granted * UNIT_BYTES
        with pytest.raises(CacheError, match="cache directory: Permission denied"):
            directory.evict()


@pytest.mark.expect_log("cache directory: Permission denied")
def test_a_cache_that_cannot_be_reached_any_more(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """If the path of the cache no longer leads to it, the log says so, and reads go on."""
    path, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    with serving(CONTENT) as server, opened(server.url, path) as file:
        path.rename(elsewhere)
        request.getfixturevalue("forbidden")
        assert read(file, 0, len(CONTENT)) == CONTENT
        (record,) = caplog.records
        assert record.getMessage().endswith(
            f"cannot store in the cache: {path}: cache directory: Permission denied"
        )


def test_entry_that_vanishes_while_room_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that another process renames or removes at the same time costs no room."""
    entry = store_one(tmp_path)
    (entry.parent / f"new-{HASH}").mkdir()
    lstat = os.lstat

    def vanish(path: str) -> os.stat_result:
        if f"new-{HASH}" in path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", vanish)
    assert CacheDirectory(CacheOptions(str(tmp_path), 10 * UNIT_BYTES)).evict() > 0
    assert entry.exists()


def test_room_is_made_beside_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """While entries are removed for long, units are not stored, and later they are again."""
    monkeypatch.setattr(cachespace, "_MAX_WAIT_SECONDS", 0.05)
    may_end, calls = threading.Event(), list[int]()

    def make() -> int:
        calls.append(1)
        may_end.wait(60)
        return 100

    reservations = CacheSpace(make)
    for _ in range(3):
        with reservations.reserve(10) as reason:
            assert reason == "older entries are still being removed"
    monkeypatch.setattr(cachespace, "_MAX_WAIT_SECONDS", 60.0)
    assert len(calls) == 1
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "qedfuse-evict":
            thread.join(60)
    with reservations.reserve(60) as reason:
        assert reason == ""
        # What is being stored may not be in the file yet when room is looked for.
        with reservations.reserve(60) as other:
            assert other == "no room is left"
    assert len(calls) == 2
    with reservations.reserve(40) as reason:
        assert reason == ""
    assert len(calls) == 2


def test_room_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host has no thread, nothing is stored, and the next reservation tries again."""

    def fail(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    reservations = CacheSpace(lambda: 100)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(3):
            with reservations.reserve(10) as reason:
                assert reason == "cannot start a thread: can't start new thread"
    assert not reservations.is_evicting
    with reservations.reserve(10) as reason:
        assert reason == ""
