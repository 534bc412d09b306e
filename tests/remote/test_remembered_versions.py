"""Overlays whose base has another version on the server than in the cache."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.lookup.baseversion import url_checksum
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingError, RemoteError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.options import RemoteOptions
from tests.support import qemu
from tests.support.remotes import DEADLINES
from tests.support.webserver import WebServer, serving

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def content(path: Path, byte: int) -> bytes:
    """Return an image whose disk begins with some bytes."""
    qemu.create(path, SIZE)
    qemu.io(path, f"write -P {byte} 0 128k")
    raw = path.read_bytes()
    path.unlink()
    return raw


def first_byte(path: Path, server: WebServer, *, accept: bool = False) -> int:
    """Open an overlay for writing, and return the first byte of its disk."""
    options = OpenOptions(
        writable=True,
        backing=BackingPolicy(base_changed=accept),
        remote=RemoteOptions(allowed=(parse_prefix(server.url),), deadlines=DEADLINES),
    )

    async def read() -> int:
        async with open_disk(str(path), options) as disk:
            return (await disk.read(0, 1))[0]

    return trio.run(read)


def overlays(server: WebServer, directory: Path, *, warm: bool) -> tuple[Path, Path]:
    """Make an overlay over each of two versions of the object; the server has the second one.

    ``warm`` is whether the cache has all of both versions.
    """
    contents = [content(directory / f"{byte}.qed", byte) for byte in (1, 2)]
    made = []
    for number, each in enumerate(contents):
        server.content, server.etag = each, f'"{number}"'
        if warm:
            assert main(["warm", "-q", server.url]) == 0
        made.append(directory / f"vm{number}.qed")
        assert main(["create", "-q", "-b", server.url, str(made[-1])]) == 0
    return made[0], made[1]


@pytest.mark.expect_log("reading it from the cache")
def test_each_overlay_gets_its_version_without_a_server(tmp_path: Path) -> None:
    """While no server answers, each overlay is over the version that it remembers."""
    with serving(b"") as server:
        old, new = overlays(server, tmp_path, warm=True)
    assert [first_byte(path, server) for path in (old, new, old)] == [1, 2, 1]


@pytest.mark.expect_log("reading the expected version from the cache")
def test_another_version_on_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The remembered version is read from the cache while the server has another; one line says so.

    What is remembered stays, until the other version is accepted.
    """
    with serving(b"") as server:
        old, new = overlays(server, tmp_path, warm=True)
        caplog.clear()
        assert first_byte(old, server) == 1
        (record,) = caplog.records
        size = len(server.content)
        assert record.getMessage() == (
            f'{server.url}: found size {size} and etag "1", expected size {size} and etag "0"; '
            "reading the expected version from the cache"
        )
        caplog.clear()
        assert first_byte(new, server) == 2
        assert not caplog.records
        assert first_byte(old, server) == 1
        assert first_byte(old, server, accept=True) == 2
        caplog.clear()
        assert first_byte(old, server) == 2
        assert not caplog.records


def test_a_record_with_an_impossible_size(tmp_path: Path) -> None:
    """A remembered size of thousands of digits, with a valid checksum, is no version."""
    with serving(b"") as server:
        _, new = overlays(server, tmp_path, warm=False)
        body = f"{url_checksum(server.url)} {'f' * 3600} etag".encode()
        checksum = zlib.crc32(server.url.encode() + b"\0" + body)
        os.setxattr(new, "user.qedfuse.base", b"%08x\n" % checksum + body)
        assert first_byte(new, server) == 2
        assert b"f" * 3600 not in os.getxattr(new, "user.qedfuse.base")


def test_a_version_that_is_not_in_the_cache(tmp_path: Path) -> None:
    """Without the remembered version in the cache, the other one is refused, and so is an outage.

    The message says that the cache does not have the remembered version.
    """
    with serving(b"") as server:
        old, _ = overlays(server, tmp_path, warm=False)
        for entry in (tmp_path / "cache" / "qedfuse").glob("object-*/version-*/map"):
            with entry.open("r+b") as file:
                file.write(bytes(8))
        assert main(["warm", "-q", server.url]) == 0
        with pytest.raises(BackingError, match="no cache has all of the expected version"):
            first_byte(old, server)
    with pytest.raises(RemoteError, match="attempts"):
        first_byte(old, server)
