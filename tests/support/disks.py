"""Small images built byte by byte, independent readers of them, and `Disk` on test host files."""

from __future__ import annotations

import functools
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.disk import Disk
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.hostio.imagefile import read_header
from qedfuse.ondisk.constants import MAGIC, SECTOR, UNALLOCATED, ZERO, Feature
from qedfuse.ondisk.header import Header, build_header
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.hostio.hostfile import HostFile

WRITABLE: Final = OpenOptions(
    writable=True, commit_seconds=3600.0, needcheck_seconds=3600.0, compact_seconds=3600.0
)
"""Options under which no background task changes the image before the disk is closed."""

UNCOMPACTED: Final = replace(WRITABLE, compact="off")
"""The same without compaction at the close."""

_MAGIC_BYTES: Final = MAGIC.to_bytes(4, "little")


def header_of(content: bytes | bytearray) -> Header:
    """Return the header of an image in memory, without validation."""
    return Header(*struct.unpack_from("<4x3L5Q2L", content))


def has_need_check(image: Path) -> bool:
    """Return whether NEED_CHECK is set in an image file."""
    with image.open("rb") as file:
        return header_of(file.read(64)).need_check


def build_image(
    size: int,
    clusters: Mapping[int, bytes | int] | None = None,
    *,
    cluster_size: int = 4096,
    table_size: int = 1,
    header_size: int = 1,
    features: int = 0,
    compat: int = 0,
    autoclear: int = 0,
    backing: bytes = b"",
) -> bytearray:
    """Return an image with a disk of ``size`` bytes.

    ``clusters`` maps numbers of guest clusters to their content: bytes, which are padded with
    zeros to a cluster, or an integer, which becomes the table entry unchanged.
    """
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=header_size,
        features=features | (Feature.BACKING_FILE if backing else 0),
        compat_features=compat,
        autoclear_features=autoclear,
        l1_table_offset=header_size * cluster_size,
        image_size=size,
        backing_filename_offset=64 if backing else 0,
        backing_filename_size=len(backing),
    )
    geometry = header.geometry
    image = bytearray(header.l1_end)
    image[:64] = build_header(header)
    image[64 : 64 + len(backing)] = backing
    tables: dict[int, int] = {}
    for number, content in (clusters or {}).items():
        l1_index, l2_index = divmod(number, geometry.entries)
        if l1_index not in tables:
            tables[l1_index] = len(image)
            put_entry(image, header.l1_table_offset + 8 * l1_index, len(image))
            image.extend(bytes(geometry.table_bytes))
        value = content if isinstance(content, int) else len(image)
        put_entry(image, tables[l1_index] + 8 * l2_index, value)
        if not isinstance(content, int):
            image.extend(content.ljust(cluster_size, b"\0"))
    return image


def put_entry(image: bytearray, offset: int, value: int) -> None:
    """Write one table entry into ``image`` at a file offset."""
    image[offset : offset + 8] = value.to_bytes(8, "little")


def get_entry(image: bytes | bytearray, offset: int) -> int:
    """Return the table entry at a file offset."""
    return int.from_bytes(image[offset : offset + 8], "little")


def l2_entry_offset(image: bytes | bytearray, number: int) -> int:
    """Return the file offset of the L2 entry of a guest cluster, whose table must exist."""
    header = header_of(image)
    l1_index, l2_index = divmod(number, header.geometry.entries)
    table = get_entry(image, header.l1_table_offset + 8 * l1_index)
    assert table, f"guest cluster {number} has no L2 table"
    return table + 8 * l2_index


@asynccontextmanager
async def opened(
    file: HostFile,
    bases: Sequence[bytes | bytearray] = (),
    options: OpenOptions = WRITABLE,
    store: SliceStore | None = None,
) -> AsyncIterator[Disk]:
    """Open a disk on a host file, over bases in memory, for the block.

    The nearest base comes first.  A base is a QED image if it begins with the magic, else raw.
    """
    store = store or make_store(options.cache_bytes)
    header = await read_header(file)
    layers = [await base_layer(content, depth, store) for depth, content in enumerate(bases, 1)]
    disk = Disk(file, header, layers, options, store)
    async with disk.serving():
        yield disk


async def base_layer(content: bytes | bytearray, depth: int, store: SliceStore) -> Layer:
    """Return the layer of one base in memory."""
    file = MemoryFile(content, name=f"base{depth}", writable=False)
    file.in_page_cache = True
    if not content.startswith(_MAGIC_BYTES):
        return RawLayer(file)
    layer = QedLayer(file, await read_header(file), store)
    await layer.scan_l1()
    return layer


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_image`: each error in words, and the offsets of leaked clusters."""

    errors: tuple[str, ...]
    leaked: tuple[int, ...] = ()

    @property
    def leaks(self) -> int:
        """How many clusters are leaked."""
        return len(self.leaked)


def inspect_image(content: bytes | bytearray) -> Inspection:
    """Check an image in memory, independently of the code under test."""
    errors: list[str] = []
    try:
        header = header_of(content)
    except struct.error:
        return Inspection(("no header",))
    if content[:4] != _MAGIC_BYTES:
        return Inspection(("no magic",))
    size, geometry = header.cluster_size, header.geometry
    length = len(content) // size * size
    owners = np.zeros(length // size, np.uint32)
    if header.l1_end > length:
        return Inspection(("the L1 table is not inside the file",))
    owners[: header.l1_end // size] += 1
    for table in _entries(content, header.l1_table_offset, geometry.table_bytes, errors, "L1"):
        if table % size or table < header.header_end or table + geometry.table_bytes > length:
            errors.append(f"L1 entry {table} is wild")
            continue
        first = table // size
        owners[first : first + geometry.table_size] += 1
        for data in _entries(content, table, geometry.table_bytes, errors, "L2"):
            if data == ZERO:
                continue
            if data % size or data < header.header_end or data + size > length:
                errors.append(f"L2 entry {data} is wild")
            else:
                owners[data // size] += 1
    if owners.size and owners.max() > 1:
        shared = np.flatnonzero(owners > 1)[:5] * size
        errors.append(f"clusters with two owners at {shared.tolist()}")
    return Inspection(tuple(errors), tuple((np.flatnonzero(owners == 0) * size).tolist()))


def _entries(
    content: bytes | bytearray, offset: int, length: int, errors: list[str], what: str
) -> Iterable[int]:
    """Return the entries of a table that are not 0; note a table that is cut short."""
    raw = content[offset : offset + length]
    if len(raw) < length:
        errors.append(f"{what} table at {offset} is cut short")
        return []
    entries = np.frombuffer(bytes(raw), "<u8")
    return [int(value) for value in entries[entries != UNALLOCATED]]


def guest_bytes(content: bytes | bytearray, base: bytes | bytearray = b"") -> bytes:
    """Return the content of the disk of an image in memory, over a base with content ``base``.

    Independent of the code under test.  The table entries must be sound.
    """
    header = header_of(content)
    size = header.image_size
    disk = bytearray(base[:size].ljust(size, b"\0"))
    for start, value in _mapping(content, header):
        end = min(start + header.cluster_size, size)
        if start >= size:
            continue
        if value == ZERO:
            disk[start:end] = bytes(end - start)
        else:
            disk[start:end] = content[value : value + end - start].ljust(end - start, b"\0")
    return bytes(disk)


def _mapping(content: bytes | bytearray, header: Header) -> Iterator[tuple[int, int]]:
    """Yield the guest offset and the value of each L2 entry that is not 0."""
    geometry = header.geometry
    tables = _table(content, header.l1_table_offset, geometry.table_bytes)
    for l1_index in np.flatnonzero(tables).tolist():
        entries = _table(content, int(tables[l1_index]), geometry.table_bytes)
        for index in np.flatnonzero(entries).tolist():
            start = l1_index * geometry.table_span + index * geometry.cluster_size
            yield start, int(entries[index])


def _table(content: bytes | bytearray, offset: int, length: int) -> NDArray[np.uint64]:
    return np.frombuffer(bytes(content[offset : offset + length]), "<u8")


@functools.cache
def pattern(length: int, seed: int) -> bytes:
    """Return bytes without zeros that differ for each ``seed``, and within themselves."""
    step = np.arange(length, dtype=np.uint64)
    mixed = (step // 7 + step * 13 + seed * 101) % 251 + 1
    return mixed.astype(np.uint8).tobytes()


def difference(got: bytes | bytearray, expected: bytes | bytearray) -> str | None:
    """Return in words where two long byte strings first differ; None if they are equal."""
    if got == expected:
        return None
    if len(got) != len(expected):
        return f"{len(got)} bytes, expected {len(expected)}"
    apart = np.flatnonzero(np.frombuffer(got, np.uint8) != np.frombuffer(expected, np.uint8))
    first = int(apart[0])
    return (
        f"{len(apart)} bytes differ, the first at {first} and the last at {int(apart[-1])}: "
        f"{bytes(got[first : first + 16])!r}, expected {bytes(expected[first : first + 16])!r}"
    )


def sector_ceil(value: int) -> int:
    """Round up to whole sectors."""
    return -(-value // SECTOR) * SECTOR
