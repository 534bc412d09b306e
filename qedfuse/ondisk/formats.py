"""Recognising the image format of a file by its first bytes."""

from __future__ import annotations

from typing import Final

from qedfuse.ondisk.constants import MAGIC

SIGNATURE_BYTES: Final = 0x44
"""How many bytes at the beginning of a file decide its format."""

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
