"""Which format a file has, by its first bytes."""

from __future__ import annotations

from typing import Final, Literal

from qedfuse.ondisk.constants import MAGIC

SIGNATURE_BYTES: Final = 8
"""How many of a file's first bytes tell."""

_QED: Final = MAGIC.to_bytes(4, "little")
_FOREIGN: Final = {
    b"QFI\xfb": "a qcow image",
    b"KDMV": "a VMDK image",
    b"COWD": "a VMDK image",
    b"vhdxfile": "a VHDX image",
    b"conectix": "a VHD image",
}


def is_qed(start: bytes | bytearray) -> bool:
    """Tell whether a file that starts like this is a QED image."""
    return start.startswith(_QED)


def foreign(start: bytes | bytearray) -> str | None:
    """Name the format of a file that is neither QED nor raw; None if it is one of those."""
    return next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)


def guess(start: bytes | bytearray) -> Literal["qed", "raw"] | None:
    """Guess a format; None for a foreign one."""
    if is_qed(start):
        return "qed"
    return None if foreign(start) else "raw"
