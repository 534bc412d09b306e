"""The flattened backing gives the same extents and bytes as asking each layer."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.extents import Extent, Kind, joined
from qedfuse.disk.lookup.flattenedbacking import MIXED, FlattenedBacking
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.ondisk.constants import ZERO
from qedfuse.ondisk.geometry import Geometry
from tests.support.disks import (
    base_layer,
    build_image,
    difference,
    guest_bytes,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import MemoryFile
from tests.support.share import share

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk

SIZE: Final = 1 << 20
SIZES: Final = (4096, 8192, 16384, 65536)


def chain_of(chance: random.Random) -> tuple[bytearray, list[bytes]]:
    """Return a chain of random depth, shapes and contents: the top image, and its bases."""
    bases: list[bytes] = [pattern(chance.randrange(0, SIZE), 1)] if chance.random() < 0.5 else []
    for level in range(chance.randrange(0 if bases else 1, 5)):
        bases.insert(0, bytes(_image(chance, level + 2, based=bool(bases))))
    return _image(chance, 99, based=True), bases


def _image(chance: random.Random, seed: int, *, based: bool) -> bytearray:
    """Return one image with some data clusters and some zero clusters."""
    size = chance.randrange(1, SIZE // 512) * 512
    cluster = chance.choice(SIZES)
    count = -(-size // cluster)
    clusters: dict[int, bytes | int] = {}
    start = chance.randrange(count)
    for number in [*range(start, min(count, start + 40)), *range(0, count, 7)]:
        if chance.random() < 0.7:
            clusters[number] = ZERO if chance.random() < 0.2 else pattern(cluster, seed + number)
    return build_image(
        size,
        clusters,
        cluster_size=cluster,
        table_size=chance.choice((1, 2)),
        backing=b"base" if based else b"",
    )


def content(top: bytes | bytearray, bases: list[bytes]) -> bytes:
    """Return the bytes that a chain reads as."""
    below = b""
    for level, base in enumerate(reversed(bases)):
        raw = not level and not base.startswith(b"QED\0")
        below = base if raw else guest_bytes(base, below)
    return guest_bytes(top, below)


@pytest.mark.parametrize("seed", range(share(20, of=60)))
async def test_flat_or_not_is_the_same(seed: int) -> None:
    """For random chains the flattened extents and reads equal those of a walk of the layers."""
    chance = random.Random(seed)
    top, bases = chain_of(chance)
    expected = content(top, bases)
    file = MemoryFile(top)
    async with opened(file, bases) as disk:
        chain = disk.chain
        assert chain.flattened is not None
        flat = 0
        for _ in range(30):
            start = chance.randrange(disk.size)
            length = min(disk.size - start, chance.choice((512, 4096, 20_000, 200_000)))
            walked = await chain._walk(start, start + length)
            found = await chain.flattened.extents(start, start + length)
            if found is not None:
                flat += 1
                assert joined(_plain(found)) == joined(_plain(sorted(walked, key=_start)))
            assert difference(await disk.read(start, length), expected[start:][:length]) is None
            flat += _read_at_once(disk, file, start, length, expected)
        assert flat


def _read_at_once(disk: Disk, file: MemoryFile, start: int, length: int, expected: bytes) -> bool:
    """Read without waiting, if that can be."""
    file.in_page_cache = True
    got = disk.try_read(start, length)
    file.in_page_cache = False
    assert got is None or difference(bytes(got), expected[start:][:length]) is None
    return got is not None


def _start(extent: Extent) -> int:
    return extent.start


def _plain(extents: list[Extent]) -> list[Extent]:
    """Leave out which layer said that there is nothing."""
    return [one._replace(depth=0) if one.kind is Kind.ZERO else one for one in extents]


async def test_a_cluster_that_several_clusters_of_a_base_show_through() -> None:
    """Several clusters of a base below one cluster are one run if they are contiguous."""
    whole = {number: pattern(4096, number) for number in range(16)}
    base = build_image(SIZE, whole, cluster_size=4096)
    order = [*range(16, 24), *range(31, 23, -1)]
    base_apart = build_image(SIZE, {at: pattern(4096, at) for at in order}, cluster_size=4096)
    top = build_image(SIZE, {}, cluster_size=65536, backing=b"base")
    for image, index, is_mixed in ((base, 0, False), (base_apart, 1, True)):
        async with opened(MemoryFile(top), [bytes(image)]) as disk:
            below = disk.chain.flattened
            assert below is not None
            codes = await below.codes(0)
            assert (codes[index] == MIXED) is is_mixed
            got = await disk.read(index * 65536, 65536)
            assert difference(got, guest_bytes(image)[index * 65536 :][:65536]) is None


async def test_bad_entries_and_cut_clusters_are_left_to_the_walk() -> None:
    """A slice with bad entries or cut clusters is left to the walk, which explains them."""
    base = build_image(SIZE, {at: pattern(65536, at) for at in range(3)}, cluster_size=65536)
    put_entry(base, l2_entry_offset(base, 1), 12345)
    del base[-1000:]
    top = build_image(SIZE, {}, cluster_size=65536, backing=b"base")
    async with opened(MemoryFile(top), [bytes(base)]) as disk:
        below = disk.chain.flattened
        assert below is not None
        codes = await below.codes(0)
        assert [code == MIXED for code in codes[:4]] == [False, True, True, False]


async def test_a_base_with_many_more_clusters_is_not_gone_through() -> None:
    """A slice above millions of clusters of a base is not flattened."""
    store = make_store(1 << 20)
    top = build_image(1 << 35, {}, cluster_size=1 << 22, table_size=1, backing=b"base")
    base = build_image(1 << 30, {0: b"x" * 4096}, cluster_size=4096, table_size=16)
    layers = [
        await base_layer(bytes(image), depth, store) for depth, image in enumerate((top, base))
    ]
    assert isinstance(layers[0], QedLayer)
    below = FlattenedBacking(layers, layers[0], store)
    assert await below.extents(0, 4096) is None
    found = await Chain(layers, below).extents(0, 4096)
    assert [(one.kind, one.depth) for one in found] == [(Kind.DATA, 1)]
    assert Geometry(4096, 16).cluster_size == found[0].length
