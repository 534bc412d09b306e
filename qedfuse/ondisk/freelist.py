"""The persistent free list: its descriptor and its clusters as bytes (docs/format-extensions.md).

Parsing validates each structure on its own; `qedfuse.disk.state.freelistreader` validates what
depends on the rest of the image.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from construct import Bytes, Int32ul, Int64ul, Struct

from qedfuse.ondisk.constants import SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.ondisk.header import Header

    Runs = NDArray[np.uint64]
    """One row for each run of adjacent free clusters: the index of its first cluster in the file,
    and the number of its clusters."""

DESCRIPTOR_OFFSET: Final = 3584
"""File offset of the descriptor: the last sector of the first 4096 bytes.  These bytes belong to
the header, which takes up whole clusters of at least 4096 bytes."""

DESCRIPTOR_BYTES: Final = SECTOR
DESCRIPTOR_END: Final = DESCRIPTOR_OFFSET + DESCRIPTOR_BYTES

MAGIC: Final = b"QEDFLIST"
CLUSTER_MAGIC: Final = b"QEDFRUNS"
VERSION: Final = 1

RUN_BYTES: Final = 16
"""Length of one run in a list cluster."""

_CHECKED_BYTES: Final = DESCRIPTOR_BYTES - 4
"""The descriptor's bytes before its checksum, which covers them."""
_UNUSED_BYTES: Final = _CHECKED_BYTES - 56
"""The descriptor's bytes between its other fields (56 bytes) and the checksum."""
_NUMBER_DTYPE: Final = np.dtype("<u8")
"""Each run is encoded as two of these numbers."""

DESCRIPTOR: Final[Any] = Struct(
    "magic" / Bytes(8),
    "version" / Int32ul,
    "list_crc" / Int32ul,
    "first_cluster" / Int64ul,
    "list_clusters" / Int64ul,
    "runs" / Int64ul,
    "free_clusters" / Int64ul,
    "file_bytes" / Int64ul,
    "unused" / Bytes(_UNUSED_BYTES),
    "crc" / Int32ul,
)

CLUSTER_HEADER: Final[Any] = Struct(
    "magic" / Bytes(8),
    "next_cluster" / Int64ul,
    "runs" / Int32ul,
    "crc" / Int32ul,
    "unused" / Bytes(8),
)
CLUSTER_HEADER_BYTES: Final = 32
_CRC_OFFSET: Final = 20
"""Offset of the checksum in the header of a list cluster, in bytes."""


class BadListError(ValueError):
    """A free list is invalid; the message has the field, what was found and what was expected."""


def refuse(field: str, found: object, expected: str) -> NoReturn:
    """Raise `BadListError` with what was found in a field of a list, and what was expected."""
    msg = f"{field}: found {found}, expected {expected}"
    raise BadListError(msg)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where a list begins, and the totals and the checksum that the list must have.

    Attributes:
        first_cluster: File offset of the first list cluster in bytes (not a cluster index).
        list_clusters: Number of clusters that hold the list; they are among the free clusters.
        runs: Number of runs in all list clusters together.
        free_clusters: Number of clusters in all runs together.
        file_bytes: Length of the image file when the list was written.
        list_crc: CRC-32 of all runs, as encoded in the list.
    """

    first_cluster: int
    list_clusters: int
    runs: int
    free_clusters: int
    file_bytes: int
    list_crc: int


@dataclass(frozen=True, slots=True)
class ListClusterHeader:
    """The header of one list cluster.

    Attributes:
        next_cluster: File offset of the next list cluster in bytes (not a cluster index); 0
            in the last list cluster.
        runs: Number of runs in this list cluster.
        crc: CRC-32 of this header, with zeros in place of the CRC, and of the runs.
    """

    next_cluster: int
    runs: int
    crc: int


def runs_in_cluster(cluster_size: int) -> int:
    """Return how many runs fit into a list cluster of ``cluster_size`` bytes."""
    return (cluster_size - CLUSTER_HEADER_BYTES) // RUN_BYTES


def build_descriptor(descriptor: Descriptor) -> bytes:
    """Encode a descriptor as the sector that it fills."""
    fields = {name: getattr(descriptor, name) for name in Descriptor.__slots__}
    fields |= {"magic": MAGIC, "version": VERSION, "unused": bytes(_UNUSED_BYTES), "crc": 0}
    data = bytes(DESCRIPTOR.build(fields))[:_CHECKED_BYTES]
    return data + zlib.crc32(data).to_bytes(4, "little")


def parse_descriptor(data: bytes | bytearray) -> Descriptor:
    """Decode the sector of a descriptor.

    Raises:
        BadListError: The sector is too short or invalid, or has another version.
    """
    if len(data) < DESCRIPTOR_BYTES:
        refuse("descriptor", f"{len(data)} bytes", f"{DESCRIPTOR_BYTES}")
    raw = DESCRIPTOR.parse(data)
    _check_magic("descriptor magic", raw.magic, MAGIC)
    _check_crc("descriptor checksum", raw.crc, zlib.crc32(data[:_CHECKED_BYTES]))
    if raw.version != VERSION:
        refuse("descriptor version", raw.version, str(VERSION))
    if any(raw.unused):
        refuse("descriptor", "unused bytes that are not zero", "zeros")
    return Descriptor(**{name: getattr(raw, name) for name in Descriptor.__slots__})


def can_be_replaced(data: bytes | bytearray) -> bool:
    """Return whether a new descriptor can replace ``data``, the bytes at `DESCRIPTOR_OFFSET`.

    True for zeros, and for bytes that begin with `MAGIC`, even if they are not a valid descriptor.
    """
    return data.startswith(MAGIC) or not any(data)


def backing_name_covers_descriptor(header: Header) -> bool:
    """Return whether the backing file name overlaps the descriptor; False if there is no name."""
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    return header.has_backing and start < DESCRIPTOR_END and end > DESCRIPTOR_OFFSET


def build_cluster(next_cluster: int, runs: Runs) -> bytes:
    """Encode the header and the runs of a list cluster, padded with zeros to whole sectors.

    The rest of the cluster need not be written.

    Args:
        next_cluster: File offset of the next list cluster in bytes; 0 for the last one.
        runs: The runs of this list cluster.
    """
    fields = {"magic": CLUSTER_MAGIC, "next_cluster": next_cluster, "runs": len(runs)}
    head = bytearray(CLUSTER_HEADER.build(fields | {"crc": 0, "unused": bytes(8)}))
    body = encode_runs(runs)
    head[_CRC_OFFSET : _CRC_OFFSET + 4] = zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little")
    data = bytes(head) + body
    return data + bytes(-len(data) % SECTOR)


def parse_cluster_header(data: bytes | bytearray, cluster_size: int) -> ListClusterHeader:
    """Decode the header of a list cluster of ``cluster_size`` bytes.

    The checksum also covers the runs, so `parse_runs` checks it.

    Raises:
        BadListError: The header is too short or invalid.
    """
    if len(data) < CLUSTER_HEADER_BYTES:
        refuse("list cluster", f"{len(data)} bytes", f"at least {CLUSTER_HEADER_BYTES}")
    raw = CLUSTER_HEADER.parse(data)
    _check_magic("list cluster magic", raw.magic, CLUSTER_MAGIC)
    max_runs = runs_in_cluster(cluster_size)
    if not 1 <= raw.runs <= max_runs:
        refuse("runs in a list cluster", raw.runs, f"1 to {max_runs}")
    if any(raw.unused):
        refuse("list cluster", "unused bytes that are not zero", "zeros")
    return ListClusterHeader(raw.next_cluster, raw.runs, raw.crc)


def parse_runs(header: ListClusterHeader, data: bytes | bytearray) -> Runs:
    """Decode the runs of the list cluster with this header; ``data`` has the cluster's first bytes.

    Raises:
        BadListError: The checksum is wrong, or ``data`` is too short.
    """
    end = CLUSTER_HEADER_BYTES + header.runs * RUN_BYTES
    if len(data) < end:
        refuse("list cluster", f"{len(data)} bytes", f"at least {end}")
    checked = bytearray(data[:end])
    checked[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
    _check_crc("list cluster checksum", header.crc, zlib.crc32(checked))
    values = np.frombuffer(checked, _NUMBER_DTYPE, offset=CLUSTER_HEADER_BYTES)
    return values.astype(np.uint64).reshape(-1, 2)


def encode_runs(runs: Runs) -> bytes:
    """Encode runs as the bytes that a list cluster holds."""
    return runs.astype(_NUMBER_DTYPE).tobytes()


def _check_magic(what: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        refuse(what, found.hex(), expected.hex())


def _check_crc(what: str, found: int, expected: int) -> None:
    if found != expected:
        refuse(what, f"0x{found:08x}", f"0x{expected:08x}")
