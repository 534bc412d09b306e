"""The header of an image: it is accepted if and only if all fields are in their ranges."""

from __future__ import annotations

import struct
from typing import Final

from qedfuse.check.headernotes import header_notes
from qedfuse.errors import ImageError
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.header import build_header, parse_fitting_header
from tests.fuzz.targets.target import Target, assert_line
from tests.support.disks import build_image

_FIELDS: Final = struct.Struct("<4I5Q2I")
_BACKING: Final = 1
_KNOWN: Final = 7 | 1 << 60
_MAX_NAME_BYTES: Final = 4095


def _is_valid(raw: bytes, size: int) -> bool:
    """Return whether a header is valid by the specification, restated without the code."""
    if len(raw) < _FIELDS.size or raw[:4] != b"QED\0":
        return False
    fields = _FIELDS.unpack_from(raw)
    _, cluster, table, header, features, _, _, l1_table, disk, name_at, name = fields
    clusters = {1 << bit for bit in range(12, 27)}
    if features & ~_KNOWN or cluster not in clusters or table not in {1, 2, 4, 8, 16}:
        return False
    entries = table * cluster // 8
    if disk % 512 or disk > min(entries * entries * cluster, (1 << 63) - 512):
        return False
    if l1_table % cluster or l1_table < max(1, header) * cluster:
        return False
    if features & _BACKING and name and (
        name > _MAX_NAME_BYTES or name_at + name > header * cluster
    ):  # fmt: skip
        return False
    return bool(l1_table + table * cluster <= size)


def check(data: bytes) -> None:
    """Parse a header of at most 64 bytes, after which the length of the file follows."""
    raw, size = data[:64], int.from_bytes(data[64:72], "little")
    is_valid = _is_valid(raw, size)
    try:
        header = parse_fitting_header(raw, size, "image")
    except ImageError as error:
        assert_line(error)
        if is_valid:
            raise
        return
    assert is_valid, "an invalid header is accepted"
    assert build_header(header) == raw
    for limits in (EntryLimits.for_l1(header, size), EntryLimits.for_l2(header, size)):
        assert limits.header_end <= limits.l1_start < size
        assert not limits.is_valid(header.l1_table_offset)
    for note in header_notes(header, size, "image"):
        assert note.message.isprintable()


def seeds() -> list[bytes]:
    """Return headers of images with each property."""
    images = [
        build_image(1 << 20),
        build_image(1 << 30, cluster_size=65536, table_size=4, header_size=2, compat=5),
        build_image(512, backing=b"base.raw", features=4, autoclear=1),
        build_image(4096, cluster_size=1 << 16, table_size=16, features=2 | 1 << 60),
    ]
    return [bytes(image[:64]) + len(image).to_bytes(8, "little") for image in images]


TARGET: Final = Target(check, seeds, (b"QED\0",), max_bytes=72)
