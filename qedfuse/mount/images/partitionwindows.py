"""Finding the partitions of a disk, each as a `DiskWindow`, and naming their files in a mount."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from qedfuse.disk.window import DiskWindow
from qedfuse.errors import UsageError
from qedfuse.mount.images.naming import MAX_NAME_BYTES, PARTITION_INFIX
from qedfuse.partitions.table import read_table

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.partitions.partition import PartitionTable

_log = logging.getLogger(__name__)

_MAX_SHOWN_PROBLEMS: Final = 3
"""Maximum number of problems of one table that the log names."""


def partition_name(name: bytes, number: int) -> bytes:
    """Return the name of the file of a partition; ``name`` is that of the disk's file."""
    return b"%s%s%d" % (name, PARTITION_INFIX, number)


async def read_windows(disk: Disk, name: bytes) -> dict[bytes, DiskWindow]:
    """Return the partitions of a disk by the names of their files, in the order of their numbers.

    An extended partition has no file, because it only contains other partitions.  A partition whose
    file name would be too long is left out.  This is logged, and so are problems of the table.

    Args:
        disk: The disk.
        name: The name of the file of the disk.

    Raises:
        QedError: The table cannot be read.
    """
    by_number = await _windows_by_number(disk)
    windows = {partition_name(name, number): window for number, window in by_number.items()}
    if any(len(file_name) > MAX_NAME_BYTES for file_name in windows):
        _log.warning(
            "%s: some partitions have no file: found file names of more than 255 bytes", disk.name
        )
    return {
        file_name: window
        for file_name, window in windows.items()
        if len(file_name) <= MAX_NAME_BYTES
    }


async def open_window(disk: Disk, number: int) -> DiskWindow:
    """Return one partition of a disk.

    Raises:
        UsageError: The disk has no partition ``number``; the message names the existing ones.
        QedError: The partition table cannot be read.
    """
    windows = await _windows_by_number(disk)
    if number in windows:
        return windows[number]
    numbers = ", ".join(map(str, windows))
    expected = f"expected one of {numbers}" if numbers else "the disk has no partitions"
    msg = f"{disk.name}: option partition: found no partition {number}, {expected}"
    raise UsageError(msg)


async def _windows_by_number(disk: Disk) -> dict[int, DiskWindow]:
    """Return the partitions of a disk by their numbers; log what is wrong with the table."""

    async def read(start: int, length: int) -> bytes:
        return bytes(await disk.read(start, length))

    table = await read_table(read, disk.size)
    if table is None:
        return {}
    _log_problems(disk, table)
    return {
        item.number: DiskWindow(
            disk, item.start, item.length, f"{disk.name}: partition {item.number}"
        )
        for item in table.partitions
        if not item.is_container
    }


def _log_problems(disk: Disk, table: PartitionTable) -> None:
    """Log the problems of a partition table in one line; log nothing without a problem."""
    if table.problems:
        shown = "; ".join(table.problems[:_MAX_SHOWN_PROBLEMS])
        more = len(table.problems) - _MAX_SHOWN_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        _log.warning("%s: partition table: %s%s", disk.name, shown, rest)
