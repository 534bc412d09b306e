"""Persistent free lists built and read byte by byte, independent of the code under test."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final

from tests.support.disks import header_of, inspect_image

if TYPE_CHECKING:
    from collections.abc import Sequence

BIT: Final = 1 << 60
DESCRIPTOR: Final = 3584
_FIELDS: Final = struct.Struct("<8sIIQQQQQ")
_CLUSTER: Final = struct.Struct("<8sQII8x")


def join(clusters: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbouring clusters to runs."""
    runs: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((cluster, 1))
    return runs


def leaked_runs(content: bytes | bytearray) -> list[tuple[int, int]]:
    """Give the runs of clusters that no table refers to."""
    size = header_of(content).cluster_size
    return join([offset // size for offset in inspect_image(content).leaked])


def set_bit(content: bytearray, *, value: bool = True) -> None:
    """Set or clear the feature bit."""
    (features,) = struct.unpack_from("<Q", content, 16)
    struct.pack_into("<Q", content, 16, features | BIT if value else features & ~BIT)


def put_list(
    content: bytearray,
    runs: Sequence[tuple[int, int]] | None = None,
    places: Sequence[int] | None = None,
    /,
    **fields: int,
) -> None:
    """Give an image a list, by default a true one of all that its tables do not refer to.

    ``places`` are the clusters that hold the list, by default as many of the lowest as
    it needs, and ``fields`` replace fields of the descriptor.  All checksums are right.
    """
    size = header_of(content).cluster_size
    runs = leaked_runs(content) if runs is None else runs
    each = (size - 32) // 16
    needed = -(-len(runs) // each)
    if places is None:
        places = [first + place for first, count in runs for place in range(count)][:needed]
    body = b"".join(struct.pack("<QQ", *run) for run in runs)
    for number, place in enumerate(places):
        part = body[16 * each * number : 16 * each * (number + 1)]
        behind = places[number + 1] * size if number + 1 < len(places) else 0
        put_cluster(content, place * size, behind, part)
    values = {
        "version": 1,
        "list_crc": zlib.crc32(body),
        "first_cluster": places[0] * size,
        "list_clusters": len(places),
        "runs": len(runs),
        "free_clusters": sum(count for _, count in runs),
        "file_bytes": len(content),
    }
    put_descriptor(content, *{**values, **fields}.values())
    set_bit(content)


def put_cluster(content: bytearray, offset: int, behind: int, body: bytes) -> None:
    """Write one list cluster at a file offset; ``behind`` is the offset of the next."""
    head = _CLUSTER.pack(b"QEDFRUNS", behind, len(body) // 16, 0)
    crc = zlib.crc32(head + body)
    data = _CLUSTER.pack(b"QEDFRUNS", behind, len(body) // 16, crc) + body
    content[offset : offset + len(data)] = data


def put_descriptor(content: bytearray, *fields: int) -> None:
    """Write a descriptor with these fields and a right checksum."""
    data = _FIELDS.pack(b"QEDFLIST", *fields).ljust(508, b"\0")
    content[DESCRIPTOR : DESCRIPTOR + 512] = data + struct.pack("<I", zlib.crc32(data))


def listed(content: bytes | bytearray) -> list[tuple[int, int]] | None:
    """Read the runs of an image's list; None if the bit is clear.  The list must be good."""
    (features,) = struct.unpack_from("<Q", content, 16)
    if not features & BIT:
        return None
    magic, version, crc, offset, clusters, count, free, length = _FIELDS.unpack_from(
        content, DESCRIPTOR
    )
    sector = content[DESCRIPTOR : DESCRIPTOR + 512]
    assert (magic, version, length) == (b"QEDFLIST", 1, len(content))
    assert sector[508:] == struct.pack("<I", zlib.crc32(sector[:508]))
    assert not any(sector[56:508])
    body = b""
    size = header_of(content).cluster_size
    places = []
    for _ in range(clusters):
        assert offset % size == 0
        places.append(offset // size)
        magic, behind, runs, own = _CLUSTER.unpack_from(content, offset)
        assert magic == b"QEDFRUNS"
        part = content[offset + 32 : offset + 32 + 16 * runs]
        assert own == zlib.crc32(part, zlib.crc32(_CLUSTER.pack(magic, behind, runs, 0)))
        body += part
        offset = behind
    assert offset == 0
    assert crc == zlib.crc32(body)
    found = [struct.unpack_from("<QQ", body, at) for at in range(0, len(body), 16)]
    assert len(found) == count
    assert sum(run[1] for run in found) == free
    free_clusters = {first + place for first, many in found for place in range(many)}
    assert set(places) <= free_clusters
    return [(first, many) for first, many in found]
