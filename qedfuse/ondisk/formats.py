"""Which format a file has, by its first bytes: the one place that knows any but our own."""

from __future__ import annotations

from typing import Final

from qedfuse.ondisk.constants import MAGIC

SIGNATURE_BYTES: Final = 0x44
"""How many of a file's first bytes tell."""

_QED: Final = MAGIC.to_bytes(4, "little")
_FOREIGN: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
)
"""Where in the file, what is there, and what that says."""
_LUKS: Final = b"LUKS\xba\xbe"


def is_qed(start: bytes | bytearray) -> bool:
    """Tell whether a file that starts like this is a QED image."""
    return start.startswith(_QED)


def is_luks(start: bytes | bytearray) -> bool:
    """Tell whether what starts like this is encrypted by LUKS.

    To QEMU that is an image format.  A raw disk that a guest has encrypted looks the same,
    so this is none of those that `foreign` names.
    """
    return start.startswith(_LUKS)


def foreign(start: bytes | bytearray) -> str | None:
    """Name the format of a file that is neither QED nor raw; None if it is one of those."""
    return next((name for at, magic, name in _FOREIGN if start.startswith(magic, at)), None)
