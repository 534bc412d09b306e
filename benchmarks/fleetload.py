"""What a machine of the fleet reads, and what that must cost a server: arithmetic without any I/O.

The arithmetic knows the rules of docs/remote.md and the layout of a QED image.  Only how
far qedfuse fetches ahead comes from the code of qedfuse (`qedfuse.remote.readahead`).
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.remote.readahead import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MIB: Final = 1 << 20
UNIT_BYTES: Final = 1 << 18
MAX_REQUEST_BYTES: Final = MIB
MAX_LONG_REQUEST_BYTES: Final = 4 * MIB
LONG_WINDOW_BYTES: Final = 16 * MIB
"""With this much to fetch ahead, a request may be long."""
MAX_AHEAD_BYTES: Final = 16 * MIB
_TABLE_SLICE_BYTES: Final = 1 << 16
_LENGTHS_BYTES: Final = (4096, 4096, 8192, 16384, 32768, 65536, 131_072)
_FILE_BYTES: Final = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 3 << 20)


class Cost(NamedTuple):
    """What some reads cost a server.

    Attributes:
        requests: The number of requests for data.
        bytes: The number of bytes in their answers.
    """

    requests: int
    bytes: int


def boot_reads(disk_bytes: int, seed: int = 1) -> list[tuple[int, int]]:
    """Return offset and length of each read of a scaled-down boot.

    The boot reads files of different lengths at random places, each from its beginning to its
    end, and between the files single blocks, until a tenth of the disk was read.
    """
    draw = random.Random(seed)
    reads: list[tuple[int, int]] = []
    left = disk_bytes // 10
    while left > 0:
        reads.append((draw.randrange(disk_bytes // 4096) * 4096, 4096))
        length = min(draw.choice(_FILE_BYTES), disk_bytes)
        at = draw.randrange((disk_bytes - length) // 4096 + 1) * 4096
        end = at + length
        while at < end:
            step = min(draw.choice(_LENGTHS_BYTES), end - at)
            reads.append((at, step))
            at += step
        left -= length + 4096
    return reads


def file_reads(image: bytes, reads: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Turn reads of a disk into those of its image's file; yield offset and length of each.

    A cluster that is not allocated, or is a zero cluster, is not read.
    """
    cluster_bytes, table_clusters = struct.unpack_from("<II", image, 4)
    (l1_offset,) = struct.unpack_from("<Q", image, 40)
    table_bytes = cluster_bytes * table_clusters
    yield 0, cluster_bytes
    known: set[int] = set()
    for offset, length in reads:
        at = offset
        while at < offset + length:
            cluster, within = divmod(at, cluster_bytes)
            table, entry = divmod(cluster, table_bytes // 8)
            step = min(offset + length - at, cluster_bytes - within)
            start = l1_offset
            for index in (table, entry):
                part = start + 8 * index // _TABLE_SLICE_BYTES * _TABLE_SLICE_BYTES
                if part not in known:
                    known.add(part)
                    yield part, _TABLE_SLICE_BYTES
                (start,) = struct.unpack_from("<Q", image, start + 8 * index)
                if start < cluster_bytes:
                    break
            else:
                yield start + within, step
            at += step


def cost(requests: Iterable[range], size: int, unit_bytes: int = UNIT_BYTES) -> Cost:
    """Return what requests for some units of a file ask of the server."""
    found = list(requests)
    total = sum(
        min(request.stop * unit_bytes, size) - request.start * unit_bytes for request in found
    )
    return Cost(len(found), total)


def needed_requests(
    reads: Iterable[tuple[int, int]],
    size: int,
    unit_bytes: int = UNIT_BYTES,
    max_ahead_bytes: int = MAX_AHEAD_BYTES,
) -> list[range]:
    """Return the units of each request that one reader with an empty cache makes.

    Args:
        reads: Offset and length of each read of the file.
        size: The length of the file.
        unit_bytes: The unit of the cache.
        max_ahead_bytes: How much is fetched ahead of a sequential reader at most; 0 for nothing.
    """
    most = max(1, MAX_REQUEST_BYTES // unit_bytes)
    last_unit = (size - 1) // unit_bytes
    fetched: set[int] = set()
    requests: list[range] = []
    readers = ReadAhead()

    def fetch(first: int, last: int, most: int) -> None:
        unit = first
        while unit <= last:
            end = unit
            while end <= last and end - unit < most and end not in fetched:
                end += 1
            if end > unit:
                requests.append(range(unit, end))
                fetched.update(range(unit, end))
            unit = max(end, unit + 1)

    for offset, length in reads:
        first, last = offset // unit_bytes, (min(offset + length, size) - 1) // unit_bytes
        fetch(first, last, most)
        window = readers.record_read(first, last, max_ahead_bytes // unit_bytes)
        end = min(last + window, last_unit)
        ahead = next((unit for unit in range(last + 1, end + 1) if unit not in fetched), None)
        # What is fetched ahead is fetched half a window at a time.
        if ahead is not None and ahead - last <= 1 + window // 2:
            readers.set_marker(ahead, end)
            is_long = window * unit_bytes >= LONG_WINDOW_BYTES
            fetch(ahead, end, MAX_LONG_REQUEST_BYTES // unit_bytes if is_long else most)
    return requests
