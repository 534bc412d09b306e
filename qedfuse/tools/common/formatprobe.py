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
        UsageError: The file is an image of a foreign format.
        HostError: The file cannot be opened or read.
        ImageError: The file is neither a regular file nor a block device.
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
    """Return the format of the source of a copy by its first bytes.

    Args:
        start: The first bytes, `SIGNATURE_BYTES` or all that the source has.
        name: Name of the source in the message.

    Raises:
        UsageError: The source is an image of a foreign format.
    """
    start = bytes(start[:SIGNATURE_BYTES])
    if is_qed(start):
        return "qed"
    found = "LUKS" if is_luks(start) else foreign_format(start)
    if found is not None:
        msg = (
            f"{name}: format: found {found}, expected raw or qed (-f raw reads the bytes "
            "unchanged, and qemu-img convert can read this format)"
        )
        raise UsageError(msg)
    return "raw"


def is_qed_image(start: bytes | bytearray, image_format: FormatChoice, name: str) -> bool:
    """Return whether a command must treat a file as QED.

    The choice of the user decides.  With ``auto`` the first bytes decide.

    Args:
        start: The first bytes of the file, `SIGNATURE_BYTES` or all that it has.
        image_format: The choice of the user.
        name: Name of the file in the message.

    Raises:
        NotQedError: The format is ``auto`` and the file is an image of a foreign format.
    """
    if image_format == "auto":
        found = foreign_format(start)
        if found is not None:
            msg = f"{name}: found a {found} image, expected QED or raw"
            raise NotQedError(msg)
        return is_qed(start)
    return image_format == "qed"
