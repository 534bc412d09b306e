"""The partitions of a disk, and the file systems in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.partitions.table import read_table
from qedfuse.tools.inspection.filesystems import FileSystem, find_file_system
from qedfuse.tools.source.source import open_source
from qedfuse.tools.source.sourcebytes import read_bytes

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions
    from qedfuse.partitions.partition import PartitionTable
    from qedfuse.tools.common.formatprobe import FormatChoice


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """The partitions of a disk, and the file systems in them.

    Attributes:
        table: The partition table; None if the disk has none.
        file_systems: What blkid recognises in each partition, by the number of the partition.
            Without a partition table, number 0 stands for the whole disk.
    """

    table: PartitionTable | None
    file_systems: dict[int, FileSystem]


async def describe_partitions(
    path: str, image_format: FormatChoice, options: OpenOptions
) -> PartitionInfo:
    """Read the partition table of a disk, and find the file systems.

    Args:
        path: An image (its bases are read as well), a file or block device with raw content, or a
            URL.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the file.

    Raises:
        QedError: As `open_source`, or the disk cannot be read.
    """
    async with open_source(path, image_format, options) as source:
        read = partial(read_bytes, source)
        table = await read_table(read, source.size)
        ranges = (
            {0: (0, source.size)}
            if table is None
            else {
                partition.number: (partition.start, partition.length)
                for partition in table.partitions
                if not partition.is_container
            }
        )
        found = {
            number: await find_file_system(read, start, length)
            for number, (start, length) in ranges.items()
            if length
        }
    return PartitionInfo(table, {number: item for number, item in found.items() if item})
