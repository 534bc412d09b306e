"""Partitions and partition tables, and the function by which the parsers read the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

ReadDisk: TypeAlias = Callable[[int, int], Awaitable[bytes]]
"""Takes the guest offset and the length of a range within the disk, and returns its bytes."""

Scheme: TypeAlias = Literal["dos", "gpt"]
"""The kind of a partition table, by the name that sfdisk uses."""

_MAX_NUMBER: Final = 255
"""The highest number that a partition can have in Linux."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that lies within the disk.

    Attributes:
        number: The number by which Linux names the partition's device: 1 for ``sda1``.
        start: Guest offset of the first byte.
        length: Length in bytes, at least one sector.
        type: The type, as sfdisk writes it: one or two hexadecimal digits, or a UUID (``gpt``).
        uuid: The UUID of the partition; empty for ``dos``.
        name: The name that is stored in the table; empty for ``dos``.
        bootable: Whether the table marks the partition as bootable (``dos``).
        is_container: Whether the partition only contains logical partitions.
    """

    number: int
    start: int
    length: int
    type: str
    uuid: str = ""
    name: str = ""
    bootable: bool = False
    is_container: bool = False

    @property
    def end(self) -> int:
        """Guest offset just past the last byte."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """The partition table of a disk.

    Attributes:
        scheme: The kind of the table.
        id: The disk's identifier: ``0x`` and eight hexadecimal digits (``dos``), or a UUID.
        sector_bytes: Length in bytes of the sectors in which the table counts.
        partitions: The partitions in the order of their numbers.
        problems: What is wrong with the table, each as a clause for a message.
    """

    scheme: Scheme
    id: str
    sector_bytes: int
    partitions: tuple[Partition, ...]
    problems: tuple[str, ...] = ()


def explain_number(number: int) -> str:
    """Return a clause if a partition cannot have ``number`` in Linux, otherwise an empty string."""
    if number <= _MAX_NUMBER:
        return ""
    return f"partition {number}: the highest number in Linux is {_MAX_NUMBER}"
