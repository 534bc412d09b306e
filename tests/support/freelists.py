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
    """Return the runs, as (first, count), that contiguous clusters form."""
    runs: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((cluster, 1))
    return runs


def leaked_runs(content: bytes | bytearray) -> list[tuple[int, int]]:
    """Return the runs of clusters that no table refers to."""
    size = header_of(content).cluster_size
    return join([offset // size for offset in inspect_image(content).leaked])


def set_bit(content: bytearray, *, value: bool = True) -> None:
    """Set or clear the feature bit."""
    (features,) = struct.unpack_from("<Q", content, 16)
    struct.pack_into("<Q", content, 16, features | BIT if value else features & ~BIT)


def put_list(
    content: bytearray,
    runs: Sequence[tuple[int, int]] | None = None,
    list_clusters: Sequence[int] | None = None,
    /,
    **fields: int,
) -> None:
    """Write a free list into an image, by default a true one of all unreferenced clusters.

    ``list_clusters`` are the clusters that hold the list, by default the lowest free ones.
    ``fields`` replace fields of the descriptor.  All checksums are right.
    """
    size = header_of(content).cluster_size
    runs = leaked_runs(content) if runs is None else runs
    each = (size - 32) // 16
    needed = -(-len(runs) // each)
    if list_clusters is None:
        list_clusters = [first + n for first, count in runs for n in range(count)][:needed]
    body = b"".join(struct.pack("<QQ", *run) for run in runs)
    for number, cluster in enumerate(list_clusters):
        part = body[16 * each * number : 16 * each * (number + 1)]
        last = number + 1 == len(list_clusters)
        put_cluster(content, cluster * size, 0 if last else list_clusters[number + 1] * size, part)
    values = {
        "version": 1,
        "list_crc": zlib.crc32(body),
        "first_cluster": list_clusters[0] * size,
        "list_clusters": len(list_clusters),
        "runs": len(runs),
        "free_clusters": sum(count for _, count in runs),
        "file_bytes": len(content),
    }
    put_descriptor(content, *{**values, **fields}.values())
    set_bit(content)


def put_cluster(content: bytearray, offset: int, following: int, body: bytes) -> None:
    """Write one list cluster at a file offset; ``following`` is the offset of the next one."""
    head = _CLUSTER.pack(b"QEDFRUNS", following, len(body) // 16, 0)
    crc = zlib.crc32(head + body)
    data = _CLUSTER.pack(b"QEDFRUNS", following, len(body) // 16, crc) + body
    content[offset : offset + len(data)] = data


def put_descriptor(content: bytearray, *fields: int) -> None:
    """Write a descriptor with these fields and a right checksum."""
    data = _FIELDS.pack(b"QEDFLIST", *fields).ljust(508, b"\0")
    content[DESCRIPTOR : DESCRIPTOR + 512] = data + struct.pack("<I", zlib.crc32(data))


def listed(content: bytes | bytearray) -> list[tuple[int, int]] | None:
    """Return the runs of an image's list, which must be sound; None if the bit is clear."""
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
    list_clusters = []
    for _ in range(clusters):
        assert offset % size == 0
        list_clusters.append(offset // size)
        magic, following, runs, own = _CLUSTER.unpack_from(content, offset)
        assert magic == b"QEDFRUNS"
        part = content[offset + 32 : offset + 32 + 16 * runs]
        assert own == zlib.crc32(part, zlib.crc32(_CLUSTER.pack(magic, following, runs, 0)))
        body += part
        offset = following
    assert offset == 0
    assert crc == zlib.crc32(body)
    found = [struct.unpack_from("<QQ", body, at) for at in range(0, len(body), 16)]
    assert len(found) == count
    assert sum(run[1] for run in found) == free
    free_clusters = {first + n for first, count in found for n in range(count)}
    assert set(list_clusters) <= free_clusters
    return [(first, count) for first, count in found]
