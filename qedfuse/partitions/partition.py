"""A partition, and how the parsers of tables read the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

ReadDisk: TypeAlias = Callable[[int, int], Awaitable[bytes]]
"""Reads a number of bytes at a guest offset, both within the disk; returns exactly that many."""

Scheme: TypeAlias = Literal["dos", "gpt"]
"""The kind of a partition table, by its name in sfdisk."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that lies within the disk.

    Attributes:
        number: Its number, by which Linux names its device: 1 for ``sda1``.
        start: Guest offset of its first byte.
        length: Its length in bytes, at least one sector.
        type: Its type, as sfdisk writes it: two hexadecimal digits (``dos``), or a UUID (``gpt``).
        uuid: The UUID of the partition; empty for ``dos``.
        name: The name that the table gives it; empty for ``dos``.
        bootable: Whether it is marked as bootable (``dos``).
        is_container: Whether it only contains logical partitions, and is no disk by itself.
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
        """Guest offset just past its last byte."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """The partition table of a disk.

    Attributes:
        scheme: The kind of the table.
        id: The disk's identifier: ``0x`` and eight hexadecimal digits (``dos``), or a UUID.
        sector_bytes: Bytes in a sector, in which the table counts.
        partitions: The partitions in the order of their numbers.
        problems: What is wrong with the table, each as a clause for a message.
    """

    scheme: Scheme
    id: str
    sector_bytes: int
    partitions: tuple[Partition, ...]
    problems: tuple[str, ...] = ()
