"""Recognising the image format of a file by its first bytes."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.ondisk.constants import MAGIC

SIGNATURE_BYTES: Final = 0x44
"""How many bytes at the beginning of a file decide its format."""

PROBE_BYTES: Final = 512
"""How many bytes at the beginning of a file decide as which format QEMU opens it."""

_QED: Final = MAGIC.to_bytes(4, "little")
_FOREIGN: Final = (
    (0, b"QFI\xfb\x00\x00\x00\x01", "QCOW"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
)
"""File offset of the magic bytes, the magic bytes, and the name of the format.  The first match
counts."""

DRIVERS: Final = {
    "QCOW": "qcow",
    "qcow2": "qcow2",
    "VMDK": "vmdk",
    "VHDX": "vhdx",
    "VHD": "vpc",
    "Parallels": "parallels",
    "VDI": "vdi",
}
"""QEMU's name of each format; the keys are the names in messages."""

BACKING_FORMATS: Final = ("raw", "qed", *sorted(DRIVERS.values()))
"""The formats that a backing file can have, as QEMU calls them."""

_LUKS: Final = b"LUKS\xba\xbe"

_PROBED: Final = (
    (re.compile(rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n"), "VMDK"),
    (re.compile(re.escape(_LUKS) + rb"\x00\x01"), "LUKS"),
    (re.compile(rb"Bochs Virtual HD Image\x00"), "Bochs"),
    (re.compile(rb"#!/bin/sh\n#V2\.0 Format\nmodprobe cloop "), "cloop"),
)
"""What QEMU also recognises at the beginning of a file, and the name of the format.

VMDK is here for descriptors without the line of `_FOREIGN`: comments and lines of spaces may
precede the version.  QEMU counts LUKS of version 2 as raw.
"""


def is_qed(start: bytes | bytearray) -> bool:
    """Return whether a file with these first bytes is a QED image."""
    return start.startswith(_QED)


def is_luks(start: bytes | bytearray) -> bool:
    """Return whether a file with these first bytes is encrypted by LUKS.

    For QEMU, LUKS is an image format.  But a raw disk that a guest has encrypted begins with the
    same bytes.
    """
    return start.startswith(_LUKS)


def image_format(start: bytes | bytearray) -> str | None:
    """Return the name of the format of an image with these first bytes; None for raw and LUKS."""
    return "QED" if is_qed(start) else foreign_format(start)


def foreign_format(start: bytes | bytearray) -> str | None:
    """Return the name of a file's format in `_FOREIGN`; None for QED, LUKS and what counts as raw.

    ``start`` holds the first `SIGNATURE_BYTES` of the file, or all bytes of a shorter file.
    """
    return next((name for at, magic, name in _FOREIGN if start.startswith(magic, at)), None)


def foreign_driver(start: bytes | bytearray) -> str | None:
    """Return a file's format as QEMU calls it; None if qedfuse itself reads the format.

    ``start`` holds the first bytes, as for `foreign_format`.
    """
    found = foreign_format(start)
    return None if found is None else DRIVERS[found]


def detected_driver(start: bytes | bytearray) -> str:
    """Return a file's format as QEMU calls it, as `foreign_driver` does, or ``qed`` or ``raw``."""
    return foreign_driver(start) or ("qed" if is_qed(start) else "raw")


def probed_format(start: bytes) -> str | None:
    """Return the name of the format as which QEMU may open a file with these first bytes.

    None if QEMU opens the file as raw.  More formats than in `image_format` count, because a guest
    that writes to a raw disk can put the bytes of any format there.

    Args:
        start: The first `PROBE_BYTES` of the file, or all bytes of a shorter file.
    """
    probed = (name for pattern, name in _PROBED if pattern.match(start))
    return image_format(start) or next(probed, None)
