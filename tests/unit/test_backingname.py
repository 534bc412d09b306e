"""Setting the backing name: a crash leaves the old name or the new one."""

from __future__ import annotations

import random

import pytest

from qedfuse.disk.state.backingname import LONG_NAME_OFFSETS, MAX_SHORT_NAME_BYTES
from qedfuse.ondisk.constants import HEADER_BYTES, MAX_BACKING_NAME, SECTOR, Feature
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


def test_capacity_of_each_location() -> None:
    """The longest name fits into each location, apart from the header and the descriptor."""
    assert HEADER_BYTES + MAX_SHORT_NAME_BYTES == SECTOR == LONG_NAME_OFFSETS[0]
    ends = [place + MAX_BACKING_NAME for place in LONG_NAME_OFFSETS]
    assert all(end < place for end, place in zip(ends, LONG_NAME_OFFSETS[1:], strict=False))
    assert ends[-1] < DESCRIPTOR_OFFSET


@pytest.mark.parametrize("seed", range(60))
async def test_every_crash_state_has_the_old_or_the_new_name(seed: int) -> None:
    """Every prefix and power failure leaves the old name or the new one."""
    chance = random.Random(seed)
    lengths = (0, 1, 300, MAX_SHORT_NAME_BYTES, MAX_SHORT_NAME_BYTES + 1, 700, MAX_BACKING_NAME)
    old = bytes(chance.choices(b"abc/", k=chance.choice(lengths)))
    image = build_image(1 << 20, {0: b"data", 9: b"more"}, backing=old, compat=1 << 33)
    if old:
        # Other programs may put it anywhere in the header's cluster.
        place = chance.choice((64, chance.randrange(64, 4096 - len(old) + 1)))
        image[64 : 64 + len(old)] = bytes(len(old))
        image[place : place + len(old)] = old
        image[56:60] = place.to_bytes(4, "little")
        assert name_in(image) == (old, False)
    for _ in range(3):
        new = bytes(chance.choices(b"xyz/", k=chance.choice(lengths)))
        raw = chance.random() < 0.5
        file = RecordingFile(image)
        async with opened(file, [b"base"] if name_in(image)[0] else []) as disk:
            await disk.set_backing(new, backing_is_raw=raw)
        allowed = {name_in(image), (new, raw and bool(new))}
        for count, content in file.prefixes():
            assert name_in(content) in allowed, count
            for _ in range(8):
                assert name_in(file.power_loss(count, chance)) in allowed, count
        assert name_in(file.content) == (new, raw and bool(new))
        header = header_of(file.content)
        assert header.compat_features == 1 << 33
        assert not header.features & Feature.NEED_CHECK
        assert file.content[4096:] == image[4096:]
        image = bytearray(file.content)
