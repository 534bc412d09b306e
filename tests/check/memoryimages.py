"""Images in memory: check and repair them, and compare the disk before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.check.checker import check_image
from qedfuse.check.repair import RepairReport, repair_image
from qedfuse.hostio.imagefile import read_header
from tests.support.disks import get_entry, header_of, inspect_image, put_entry
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.check.findings import CheckReport, LostRange

CLUSTER_BYTES: Final = 4096
TABLE_SPAN_BYTES: Final = 512 * CLUSTER_BYTES
DISK_BYTES: Final = 4 * TABLE_SPAN_BYTES
BASE: Final = b"\xbb" * DISK_BYTES


async def check(content: bytearray) -> CheckReport:
    """Check an image in memory."""
    file = MemoryFile(content, writable=False)
    return await check_image(file, await read_header(file))


async def repair(content: bytearray) -> RepairReport:
    """Repair an image in memory, in place; no error may remain."""
    file = MemoryFile(content)
    result = await repair_image(file, await read_header(file))
    content[:] = file.content
    assert result.after.errors == 0
    assert inspect_image(content).errors == ()
    return result


def l1_entry(content: bytearray, index: int) -> int:
    """Give the file offset of an L1 entry."""
    return header_of(content).l1_table_offset + 8 * index


def cluster(disk: bytes, number: int) -> bytes:
    """Cut a guest cluster out of a disk."""
    return disk[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES]


def move_table_to_the_end(content: bytearray, *, table_bytes: int = CLUSTER_BYTES) -> int:
    """Put the first L2 table behind everything else; give its new file offset."""
    entry = l1_entry(content, 0)
    old, new = get_entry(content, entry), len(content)
    content.extend(content[old : old + table_bytes])
    put_entry(content, entry, new)
    return new


def readable(content: bytearray, base: bytes) -> bytes:
    """Read a damaged disk as a careful reader does: only through usable entries."""
    header = header_of(content)
    disk = bytearray(base.ljust(DISK_BYTES, b"\0"))
    for l1_index in range(DISK_BYTES // TABLE_SPAN_BYTES):
        table = get_entry(content, header.l1_table_offset + 8 * l1_index)
        if table % CLUSTER_BYTES or table < header.l1_end or table >= len(content):
            continue
        for index in range(512):
            value = get_entry(content, table + 8 * index)
            start = l1_index * TABLE_SPAN_BYTES + index * CLUSTER_BYTES
            if value == 1:
                disk[start : start + CLUSTER_BYTES] = bytes(CLUSTER_BYTES)
            elif value >= header.l1_end and not value % CLUSTER_BYTES and value < len(content):
                disk[start : start + CLUSTER_BYTES] = content[value : value + CLUSTER_BYTES].ljust(
                    CLUSTER_BYTES, b"\0"
                )
    return bytes(disk)


def assert_lossless(after: bytes, lost: Iterable[LostRange], before: bytes) -> None:
    """Assert that ranges of a disk that are not reported as lost read as before."""
    reported = {
        number
        for item in lost
        for number in range(
            item.start // CLUSTER_BYTES, -(-(item.start + item.length) // CLUSTER_BYTES)
        )
    }
    differing = np.frombuffer(after, np.uint8) != np.frombuffer(before, np.uint8)
    changed = np.flatnonzero(differing.reshape(-1, CLUSTER_BYTES).any(axis=1)).tolist()
    assert set(changed) <= reported, set(changed) - reported
