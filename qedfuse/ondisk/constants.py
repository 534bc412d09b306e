"""Numbers that the QED specification fixes.

Source: QEMU's "QED Image File Format Specification" and its driver's limits.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

MAGIC: Final = 0x00444551
"""``QED\\0`` as a little-endian integer."""

HEADER_BYTES: Final = 64
"""Length of the fixed part of the header, in bytes."""

SECTOR: Final = 512
"""The disk's size is a multiple of this many bytes; a host disk writes this much at once."""

MIN_CLUSTER_SIZE: Final = 1 << 12
MAX_CLUSTER_SIZE: Final = 1 << 26
DEFAULT_CLUSTER_SIZE: Final = 1 << 16

MIN_TABLE_SIZE: Final = 1
MAX_TABLE_SIZE: Final = 16
DEFAULT_TABLE_SIZE: Final = 4

ENTRY_BYTES: Final = 8
"""Length of one L1 or L2 table entry, in bytes."""

MAX_OFFSET: Final = (1 << 63) - 1
"""Largest offset that the kernel's file interface can name, in bytes."""

MAX_BACKING_NAME: Final = 1023
"""Longest backing file name that QEMU opens, in bytes."""

UNALLOCATED: Final = 0
"""Table entry: nothing here; the backing file shows through, or zeros."""

ZERO: Final = 1
"""L2 table entry: a cluster of zeros that hides the backing file."""


class Feature(IntFlag):
    """Incompatible feature bits: a program that does not know one must not open the image."""

    BACKING_FILE = 0x01
    NEED_CHECK = 0x02
    BACKING_FORMAT_NO_PROBE = 0x04
    FREE_LIST = 1 << 60
    """Ours, not QEMU's: see docs/format-extensions.md, also for why it is this bit."""


KNOWN_FEATURES: Final = int(
    Feature.BACKING_FILE | Feature.NEED_CHECK | Feature.BACKING_FORMAT_NO_PROBE | Feature.FREE_LIST
)
KNOWN_AUTOCLEAR: Final = 0
"""No autoclear bit is defined: each one found is cleared before the image is changed."""
