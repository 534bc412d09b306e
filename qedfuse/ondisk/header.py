"""The header of an image: 64 bytes at the start of the file.

Source: QEMU's QED specification, "Header".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from construct import Int32ul, Int64ul, Struct

from qedfuse.errors import HeaderError, NotQedError, UnsupportedError
from qedfuse.ondisk.constants import (
    HEADER_BYTES,
    KNOWN_AUTOCLEAR,
    KNOWN_FEATURES,
    MAGIC,
    MAX_BACKING_NAME,
    SECTOR,
    Feature,
)
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.geometry import SIZE_LIMITS, Geometry, expected_size

HEADER_STRUCT: Final[Any] = Struct(
    "magic" / Int32ul,
    "cluster_size" / Int32ul,
    "table_size" / Int32ul,
    "header_size" / Int32ul,
    "features" / Int64ul,
    "compat_features" / Int64ul,
    "autoclear_features" / Int64ul,
    "l1_table_offset" / Int64ul,
    "image_size" / Int64ul,
    "backing_filename_offset" / Int32ul,
    "backing_filename_size" / Int32ul,
)


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header.

    Attributes:
        cluster_size: Bytes in a cluster.
        table_size: Clusters in an L1 or L2 table.
        header_size: Clusters reserved for the header.  With 0, which is valid as in QEMU, the
            header takes up one cluster, without space for a backing name.
        features: Incompatible feature bits, all of which this program knows.
        compat_features: Compatible feature bits; unknown ones are ignored and preserved.
        autoclear_features: Autoclear feature bits; unknown ones must be cleared before the first
            modification of the image.
        l1_table_offset: File offset of the L1 table.
        image_size: Size of the disk in bytes.
        backing_filename_offset: File offset of the backing name; meaningless without a name.
        backing_filename_size: Length of the backing name in bytes.
        geometry: The cluster size, the table size, and what is computed from the two.
    """

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    backing_filename_offset: int = 0
    backing_filename_size: int = 0
    geometry: Geometry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the geometry."""
        object.__setattr__(self, "geometry", Geometry(self.cluster_size, self.table_size))

    @property
    def header_end(self) -> int:
        """The file offset at which the header ends; tables and data lie after it."""
        return max(1, self.header_size) * self.cluster_size

    @property
    def l1_end(self) -> int:
        """The file offset just past the L1 table, in bytes."""
        return self.l1_table_offset + self.geometry.table_bytes

    @property
    def has_backing(self) -> bool:
        """Whether the image names a backing file; an empty name means none, as in QEMU."""
        return bool(self.features & Feature.BACKING_FILE) and self.backing_filename_size > 0

    @property
    def backing_is_raw(self) -> bool:
        """Whether the backing file is raw, so its format is not probed."""
        return bool(self.features & Feature.BACKING_FORMAT_NO_PROBE)

    @property
    def need_check(self) -> bool:
        """Whether the tables may be inconsistent (NEED_CHECK)."""
        return bool(self.features & Feature.NEED_CHECK)

    @property
    def has_free_list(self) -> bool:
        """Whether the image has a persistent list of its free clusters (FREE_LIST)."""
        return bool(self.features & Feature.FREE_LIST)

    @property
    def stale_autoclear(self) -> int:
        """The autoclear bits that must be cleared before the image is changed."""
        return self.autoclear_features & ~KNOWN_AUTOCLEAR

    def with_need_check(self, *, value: bool) -> Header:
        """Return this header with NEED_CHECK set or cleared."""
        bit = int(Feature.NEED_CHECK)
        return replace(self, features=self.features | bit if value else self.features & ~bit)

    def with_free_list(self, *, value: bool) -> Header:
        """Return this header with FREE_LIST set or cleared."""
        bit = int(Feature.FREE_LIST)
        return replace(self, features=self.features | bit if value else self.features & ~bit)

    def with_size(self, image_size: int) -> Header:
        """Return this header for a disk of ``image_size`` bytes."""
        return replace(self, image_size=image_size)

    def without_stale_autoclear(self) -> Header:
        """Return this header with unknown autoclear bits cleared."""
        return replace(self, autoclear_features=self.autoclear_features & KNOWN_AUTOCLEAR)

    def check_fits(self, file_size: int, name: str) -> None:
        """Check that the L1 table lies inside a file of ``file_size`` bytes, called ``name``.

        Raises:
            HeaderError: The L1 table is not wholly inside the file.
        """
        if self.l1_end > file_size:
            raise HeaderError(
                name,
                "l1_table_offset",
                f"{self.l1_table_offset} (table of {self.geometry.table_bytes} bytes)",
                f"a whole table inside the file of {file_size} bytes",
            )


def parse_header(data: bytes, name: str) -> Header:
    """Parse ``data``, the first bytes of a file that messages call ``name``.

    Raises:
        NotQedError: The data is too short, or has no QED magic.
        HeaderError: A field is out of its range.
        UnsupportedError: Unknown incompatible feature bits are set.
    """
    if len(data) < HEADER_BYTES:
        if not is_qed(data):
            msg = f"{name}: not a QED image: found {len(data)} bytes, expected a header of 64"
            raise NotQedError(msg)
        msg = f"{name}: truncated header: found {len(data)} bytes, expected 64"
        raise NotQedError(msg)
    raw = HEADER_STRUCT.parse(data[:HEADER_BYTES])
    if raw.magic != MAGIC:
        msg = (
            f"{name}: not a QED image: header field magic: "
            f"found 0x{raw.magic:08x}, expected 0x{MAGIC:08x}"
        )
        raise NotQedError(msg)
    # Check the feature bits first, because an unknown bit may change the meaning of any field.
    unknown = raw.features & ~KNOWN_FEATURES
    if unknown:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        msg = (
            f"{name}: header field features: found unknown incompatible bits 0x{unknown:x} "
            f"(bit {bits}), expected only bits 0, 1, 2 and 60"
        )
        raise UnsupportedError(msg)
    for size_field in SIZE_LIMITS:
        expected = expected_size(size_field, raw[size_field])
        if expected is not None:
            raise HeaderError(name, size_field, raw[size_field], expected)
    header = Header(
        cluster_size=raw.cluster_size,
        table_size=raw.table_size,
        header_size=raw.header_size,
        features=raw.features,
        compat_features=raw.compat_features,
        autoclear_features=raw.autoclear_features,
        l1_table_offset=raw.l1_table_offset,
        image_size=raw.image_size,
        backing_filename_offset=raw.backing_filename_offset,
        backing_filename_size=raw.backing_filename_size,
    )
    _check_offsets(header, name)
    return header


def parse_fitting_header(data: bytes, file_size: int, name: str) -> Header:
    """Parse a header, and check it against the length of its file in bytes.

    Raises:
        ImageError: The header is refused, or the L1 table is not wholly inside the file.
    """
    header = parse_header(data, name)
    header.check_fits(file_size, name)
    return header


def _check_offsets(header: Header, name: str) -> None:
    """Check sizes and offsets against the geometry and against each other."""
    geometry = header.geometry
    size = header.image_size
    if size % SECTOR or size > geometry.max_image_size:
        expected = f"a multiple of {SECTOR} up to {geometry.max_image_size}"
        raise HeaderError(name, "image_size", size, expected)
    offset = header.l1_table_offset
    if geometry.in_cluster(offset) or offset < header.cluster_size:
        expected = f"a multiple of {header.cluster_size} past the header"
        raise HeaderError(name, "l1_table_offset", offset, expected)
    if offset < header.header_end:
        cluster = offset // header.cluster_size
        expected = f"at most {cluster}, because the L1 table begins at cluster {cluster}"
        raise HeaderError(name, "header_size", header.header_size, expected)
    if header.has_backing:
        length = header.backing_filename_size
        if length > MAX_BACKING_NAME:
            expected = f"at most {MAX_BACKING_NAME}"
            raise HeaderError(name, "backing_filename_size", length, expected)
        end = header.backing_filename_offset + length
        area = header.header_size * header.cluster_size
        if end > area:
            expected = f"a name of {length} bytes inside the header's {area} bytes"
            raise HeaderError(
                name, "backing_filename_offset", header.backing_filename_offset, expected
            )


def build_header(header: Header) -> bytes:
    """Encode a header as the 64 bytes at the start of a file."""
    fields = {
        item.name: getattr(header, item.name)
        for item in HEADER_STRUCT.subcons
        if item.name != "magic"
    }
    return bytes(HEADER_STRUCT.build({"magic": MAGIC, **fields}))
