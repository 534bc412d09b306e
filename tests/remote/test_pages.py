"""Reads of the cache that the mount's extension answers by itself (``_cachedread.c``)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.mount.fuse import extraops
from qedfuse.remote.address import parse_address
from qedfuse.remote.options import RemoteOptions
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support import qemu
from tests.support.fusewire import session_of
from tests.support.readsession import Session
from tests.support.remotes import opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)


@pytest.fixture
def session() -> Iterator[Session]:
    """Make a session, and end it."""
    with session_of(Session()) as made:
        yield made


async def test_an_overlay_and_its_cached_base_are_answered(
    session: Session, tmp_path: Path
) -> None:
    """Data of a local overlay is answered, and data of its base on a server after a first read."""
    content = bytearray(some_bytes(SIZE / UNIT_BYTES))
    raw, base, overlay = (tmp_path / name for name in ("raw", "base.qed", "vm.qed"))
    raw.write_bytes(content)
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qed", raw, base)
    with serving(await trio.Path(base).read_bytes()) as server:
        await create_image(str(overlay), SIZE, backing=server.url)
        remote = RemoteOptions(
            cache_directory=str(tmp_path / "cache"), allowed=(parse_address(server.url),)
        )
        options = OpenOptions(writable=True, compact="off", remote=remote)
        async with open_disk(str(overlay), options) as disk:
            content[8 * MIB : 9 * MIB] = bytes([7]) * MIB
            await disk.write(8 * MIB, bytes([7]) * MIB)
            await disk.read(0, 4096)  # the tables of the base
            session.show(*disk.tables_for_reads())
            fetched = len(server.requests)
            assert session.read(8 * MIB, 4096) == bytes([7]) * 4096
            assert session.read(4 * MIB, 4096) is None, "not fetched yet"
            # The read of the tables may have begun to read ahead.
            later = server.requests[fetched:]
            assert all(last < 2 * MIB for _, last in later), "the extension itself fetches nothing"
            for start in range(0, SIZE, MIB):
                assert await disk.read(start, MIB) == content[start : start + MIB]
            declined = 0
            for start in random.Random(1).sample(range(0, SIZE, 4096), 200):
                found = session.read(start, 4096)
                if found is None:  # the kernel may drop a page at any time
                    declined += 1
                    found = bytes(await disk.read(start, 4096))
                assert found == bytes(content[start : start + 4096])
            assert declined <= 20


def test_without_a_cache_nothing_is_answered(tmp_path: Path) -> None:
    """A file without a cache has no source of pages, one with a cache has the units read so far."""
    with serving(some_bytes(3.5)) as server:
        with opened(server.url, None) as file:
            assert file.page_source is None
        with opened(server.url, tmp_path) as file:
            read(file, UNIT_BYTES + 5, 10)
            source = file.page_source
            assert source is not None
            assert source.units is not None
            assert list(source.units.ready) == [0, 1, 0, 0]
            assert 1 << source.units.unit_bits == UNIT_BYTES
            assert source.units.content_bytes == len(server.content)
