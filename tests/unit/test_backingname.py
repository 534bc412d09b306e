"""Setting the backing name: a crash leaves the old name or the new one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from qedfuse.disk.state.backingname import MAX_SHORT_NAME_BYTES, new_name_offset
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import (
    HEADER_BYTES,
    MAX_BACKING_NAME,
    MAX_STORED_NAME,
    SECTOR,
    Feature,
)
from qedfuse.ondisk.freelist import DESCRIPTOR_OFFSET
from qedfuse.ondisk.header import parse_header
from tests.support.disks import build_image, header_of, opened
from tests.support.hostfiles import RecordingFile


def name_in(image: bytes | bytearray) -> tuple[bytes, bool]:
    """Read the name as any reader would, and whether the base is said to be raw."""
    header = parse_header(bytes(image[:HEADER_BYTES]), "image")
    start = header.backing_filename_offset if header.has_backing else 0
    size = header.backing_filename_size if header.has_backing else 0
    return bytes(image[start : start + size]), header.backing_is_raw


def old_image(cluster_size: int, old: bytes, place: int) -> bytearray:
    """Return an image with a name that another program has put anywhere in the header's cluster."""
    clusters = {0: b"data", 9: b"more"}
    image = build_image(
        1 << 20, clusters, cluster_size=cluster_size, backing=old, autoclear=1, compat=1 << 33
    )
    if old:
        image[64 : 64 + len(old)] = bytes(len(old))
        image[place : place + len(old)] = old
        image[56:60] = place.to_bytes(4, "little")
        assert name_in(image) == (old, False)
    return image


@pytest.mark.parametrize(
    ("cluster_size", "length"),
    [(4096, MAX_STORED_NAME), *((8192, n) for n in (1024, 2048, 3500, MAX_BACKING_NAME))],
)
def test_the_longest_new_name_has_space_beside_each_old_one(cluster_size: int, length: int) -> None:
    """The longest name gets sectors without old name, header and descriptor.

    In clusters of 4 KiB that holds for every old name that qedfuse stores, in larger ones for every
    old name, wherever it lies.
    """
    image = build_image(1 << 20, cluster_size=cluster_size, backing=b"x" * length)
    for place in range(cluster_size - length + 1):
        header = replace(header_of(image), backing_filename_offset=place)
        offset = new_name_offset(header, MAX_STORED_NAME, "image")
        sectors = set(range(offset // SECTOR, -(-(offset + MAX_STORED_NAME) // SECTOR)))
        old = set(range(place // SECTOR, -(-(place + length) // SECTOR)))
        assert not sectors & (old | {0, DESCRIPTOR_OFFSET // SECTOR}), place
        assert offset + MAX_STORED_NAME <= cluster_size
        assert new_name_offset(header, MAX_SHORT_NAME_BYTES, "image") == HEADER_BYTES
    assert HEADER_BYTES + MAX_SHORT_NAME_BYTES == SECTOR


def draw_length(chance: random.Random, longest: int) -> int:
    """Draw the length of a name, often one next to a limit."""
    limits = (0, 1, MAX_SHORT_NAME_BYTES, MAX_SHORT_NAME_BYTES + 1, MAX_STORED_NAME)
    return chance.choice((*limits, longest, chance.randrange(longest)))


@pytest.mark.parametrize("seed", range(80))
async def test_every_crash_state_has_the_old_or_the_new_name(seed: int) -> None:
    """Every prefix and power failure leaves the old name or the new one."""
    chance = random.Random(seed)
    cluster_size = (4096, 4096, 8192, 65536)[seed % 4]
    longest = min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES)
    old = bytes(chance.choices(b"abc/", k=draw_length(chance, longest)))
    place = chance.choice((64, chance.randrange(64, min(cluster_size, 9000) - len(old) + 1)))
    image = old_image(cluster_size, old, place)
    for _ in range(3):
        new = bytes(chance.choices(b"xyz/", k=draw_length(chance, MAX_STORED_NAME)))
        raw = chance.random() < 0.5
        file = RecordingFile(image)
        async with opened(file, [b"base"] if name_in(image)[0] else []) as disk:
            try:
                await disk.set_backing(new, backing_is_raw=raw)
            except UsageError:
                assert cluster_size == 4096
                assert len(name_in(image)[0]) > MAX_STORED_NAME
                assert len(new) > MAX_SHORT_NAME_BYTES
                assert file.changes == []
                continue
        allowed = {name_in(image), (new, raw and bool(new))}
        for count, content in file.prefixes():
            assert name_in(content) in allowed, count
            for _ in range(8):
                assert name_in(file.power_loss(count, chance)) in allowed, count
        assert name_in(file.content) == (new, raw and bool(new))
        header = header_of(file.content)
        assert header.compat_features == 1 << 33
        assert not header.features & Feature.NEED_CHECK
        assert file.content[cluster_size:] == image[cluster_size:]
        image = bytearray(file.content)


@pytest.mark.parametrize(
    ("cluster_size", "length"),
    [
        *((4096, 1), (4096, MAX_SHORT_NAME_BYTES), (8192, MAX_SHORT_NAME_BYTES)),
        *((8192, MAX_SHORT_NAME_BYTES + 1), (8192, MAX_STORED_NAME), (65536, MAX_STORED_NAME)),
    ],
)
async def test_over_the_longest_old_name(cluster_size: int, length: int) -> None:
    """A crash leaves the longest old name whole, or the new one.

    Header and short name change in one sector, also where the old name begins in this sector.
    """
    old = b"abc/" * 1024
    old = old[: min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES)]
    image = old_image(cluster_size, old, HEADER_BYTES)
    file = RecordingFile(image)
    async with opened(file, [b"base"]) as disk:
        await disk.set_backing(b"n" * length, backing_is_raw=True)
    found = Counter(name_in(content) for _, content in file.prefixes())
    for count in range(len(file.changes) + 1):
        found.update(name_in(file.power_loss(count, random.Random(seed))) for seed in range(20))
    assert set(found) == {(old, False), (b"n" * length, True)}
    assert file.content[cluster_size:] == image[cluster_size:]
    if length <= MAX_SHORT_NAME_BYTES:
        assert file.content[SECTOR:] == image[SECTOR:]


@pytest.mark.parametrize("length", [MAX_SHORT_NAME_BYTES + 1, MAX_STORED_NAME])
async def test_a_long_name_without_space_changes_nothing(length: int) -> None:
    """The refusal says where the old name lies; the header keeps its stale autoclear bits."""
    image = old_image(4096, b"o" * 3000, 700)
    file = RecordingFile(image, name="vm.qed")
    async with opened(file, [b"base"]) as disk:
        with pytest.raises(UsageError) as refusal:
            await disk.set_backing(b"n" * length, backing_is_raw=False)
    assert str(refusal.value) == (
        "vm.qed: backing file name: found the present name in bytes 700 to 3699 of the header's "
        f"4096 bytes, which leaves no space for a new name of {length} bytes, expected a new name "
        "of at most 448 bytes"
    )
    assert file.changes == []
