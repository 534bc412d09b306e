"""The text and the JSON of ``qedimg info --partitions``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qedfuse.partitions.typenames import type_name
from qedfuse.text import printable
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.partitions.partition import Partition, PartitionTable
    from qedfuse.tools.inspection.filesystems import FileSystem
    from qedfuse.tools.inspection.partitioninfo import PartitionInfo


def partition_lines(info: PartitionInfo) -> Iterator[str]:
    """Yield the lines that describe the partitions of a disk."""
    table = info.table
    if table is None:
        found = info.file_systems.get(0)  # of the whole disk
        yield "partition table: none" + ("" if found is None else f", the disk is {_named(found)}")
        return
    yield f"partition table: {table.scheme}, {table.id}, sectors of {table.sector_bytes} bytes"
    for partition in table.partitions:
        yield f"    {_line(table, partition, info.file_systems.get(partition.number))}"
    yield from (f"    problem: {problem}" for problem in table.problems)


def _line(table: PartitionTable, partition: Partition, found: FileSystem | None) -> str:
    """Return the line of one partition."""
    words = [
        f"{partition.number}: {format_size(partition.length)} at {partition.start}",
        type_name(table.scheme, partition.type),
    ]
    if partition.name:
        words.append(f"name {printable(partition.name)}")
    if partition.bootable:
        words.append("bootable")
    if found is not None:
        words.append(_named(found))
    return ", ".join(words)


def _named(found: FileSystem) -> str:
    """Return the type of a file system with its label and UUID."""
    label = f" labelled {printable(found.label)}" if found.label else ""
    uuid = f" ({printable(found.uuid)})" if found.uuid else ""
    return printable(found.type) + label + uuid


def partitions_json(info: PartitionInfo) -> dict[str, Any]:
    """Return the partitions of a disk as values for JSON."""
    systems = {number: _file_system(found) for number, found in info.file_systems.items()}
    table = info.table
    if table is None:
        return {"table": None, "file-system": systems.get(0)}
    return {
        "table": table.scheme,
        "id": table.id,
        "sector-size": table.sector_bytes,
        "partitions": [
            {
                "number": partition.number,
                "start": partition.start,
                "length": partition.length,
                "type": partition.type,
                "type-name": type_name(table.scheme, partition.type),
                "uuid": partition.uuid or None,
                "name": partition.name or None,
                "bootable": partition.bootable,
                "contains-partitions": partition.is_container,
                "file-system": systems.get(partition.number),
            }
            for partition in table.partitions
        ],
        "problems": list(table.problems),
    }


def _file_system(found: FileSystem) -> dict[str, Any]:
    return {"type": found.type, "label": found.label or None, "uuid": found.uuid or None}
