"""Reading the partition table of a disk: a GPT or a DOS table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.partitions.gpt import read_gpt
from qedfuse.partitions.mbr import read_mbr

if TYPE_CHECKING:
    from qedfuse.partitions.partition import PartitionTable, ReadDisk


async def read_table(read: ReadDisk, size: int) -> PartitionTable | None:
    """Return the partition table of a disk of ``size`` bytes.

    Returns None if the disk has no table, for example because a file system begins at the first
    sector.  The table is untrusted: whatever its content, at most 514 boot records, or 4 MiB of the
    entries of a GPT, are read.

    Raises:
        QedError: The disk cannot be read.
    """
    return await read_gpt(read, size) or await read_mbr(read, size)
