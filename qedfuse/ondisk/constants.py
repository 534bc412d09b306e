"""Numbers of the QED format, and the limits of the kernel and of this program.

Source of the numbers of the format: QEMU's "QED Image File Format Specification", and the limits
of QEMU's driver.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

MAGIC: Final = 0x00444551
"""``QED\\0`` as a little-endian integer."""

HEADER_BYTES: Final = 64
"""Length of the fixed part of the header, in bytes."""

SECTOR: Final = 512
"""Bytes in a sector.  A disk has a whole number of sectors; a host disk writes each atomically."""

MIN_CLUSTER_SIZE: Final = 1 << 12
MAX_CLUSTER_SIZE: Final = 1 << 26
DEFAULT_CLUSTER_SIZE: Final = 1 << 16
"""Cluster sizes are in bytes."""

MIN_TABLE_SIZE: Final = 1
MAX_TABLE_SIZE: Final = 16
DEFAULT_TABLE_SIZE: Final = 4
"""Table sizes are in clusters."""

ENTRY_BYTES: Final = 8
"""Length of one L1 or L2 table entry, in bytes."""

MAX_OFFSET: Final = (1 << 63) - 1
"""Maximum file offset of the kernel (a signed 64-bit ``loff_t``), in bytes."""

MAX_BACKING_NAME: Final = 4095
"""Maximum length in bytes of the backing file name in an image that is opened.  QEMU refuses images
with longer names."""

MAX_STORED_NAME: Final = 1023
"""Maximum length in bytes of a backing file name that this program stores in an image.  Early
versions of QEMU, with a buffer of 1024 bytes for the name, refuse images with longer names."""

UNALLOCATED: Final = 0
"""Table entry: nothing is stored.  The backing file shows, or zeros where there is none."""

ZERO: Final = 1
"""L2 table entry: the cluster reads as zeros, whatever the backing file contains."""


class Feature(IntFlag):
    """Incompatible feature bits: a program that does not know a bit must not open the image."""

    BACKING_FILE = 0x01
    """The image has a backing file."""
    NEED_CHECK = 0x02
    """The tables may be inconsistent."""
    BACKING_FORMAT_NO_PROBE = 0x04
    """The backing file is raw, whatever its first bytes are."""
    FREE_LIST = 1 << 60
    """The persistent free list, an extension of qedfuse (docs/format-extensions.md)."""


KNOWN_FEATURES: Final = int(
    Feature.BACKING_FILE | Feature.NEED_CHECK | Feature.BACKING_FORMAT_NO_PROBE | Feature.FREE_LIST
)
"""The incompatible feature bits that this program supports; any other bit is refused."""

KNOWN_AUTOCLEAR: Final = 0
"""The autoclear feature bits that this program preserves: none, because QED defines none."""
