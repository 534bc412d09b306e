"""Format detection: whether a file is QED, raw or foreign, by its first bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.errors import HostError, NotQedError, UsageError
from qedfuse.hostio.regular import open_raw
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign_format, is_luks, is_qed
from qedfuse.text import printable

if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    ImageFormat: TypeAlias = Literal["raw", "qed"]

    FormatChoice: TypeAlias = Literal["auto", "raw", "qed"]
    """A format, or ``auto`` to detect it by the first bytes."""


def probe_format(path: str) -> ImageFormat:
    """Return the format of a file or block device by its first bytes.

    Raises:
        UsageError: It is an image of a foreign format.
        HostError: It cannot be opened or read.
        ImageError: It is neither a regular file nor a block device.
    """
    fd = open_raw(path, os.O_RDONLY)
    try:
        start = os.pread(fd, SIGNATURE_BYTES, 0)
    except OSError as error:
        raise HostError.from_os(error, printable(path), "read") from error
    finally:
        os.close(fd)
    return format_of(start, printable(path))


def format_of(start: bytes | bytearray | memoryview, name: str) -> ImageFormat:
    """Return the format of a copy's source by its first bytes; ``name`` is for the message.

    Raises:
        UsageError: It is an image of a foreign format.
    """
    start = bytes(start[:SIGNATURE_BYTES])
    if is_qed(start):
        return "qed"
    found = "LUKS" if is_luks(start) else foreign_format(start)
    if found is not None:
        msg = (
            f"{name}: format: found {found}, expected raw or qed (-f raw reads its bytes "
            "unchanged; qemu-img convert reads the format)"
        )
        raise UsageError(msg)
    return "raw"


def is_qed_image(start: bytes | bytearray, image_format: FormatChoice, name: str) -> bool:
    """Return whether a file is described as QED: as the user says, else by its first bytes.

    Raises:
        NotQedError: The user says nothing, and it is an image of a foreign format.
    """
    if image_format == "auto":
        found = foreign_format(start)
        if found is not None:
            msg = f"{name}: found a {found} image, expected QED or raw"
            raise NotQedError(msg)
        return is_qed(start)
    return image_format == "qed"
