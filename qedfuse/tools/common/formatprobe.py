"""Format detection: whether a file is QED, raw or foreign, from its first bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, NotQedError, QedError, UsageError
from qedfuse.hostio.regular import open_raw, open_regular
from qedfuse.ondisk.formats import (
    SIGNATURE_BYTES,
    foreign_driver,
    foreign_format,
    is_luks,
    is_qed,
)
from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    from qedfuse.remote.options import RemoteOptions

    ImageFormat: TypeAlias = Literal["raw", "qed"]

    FormatChoice: TypeAlias = Literal["auto", "raw", "qed"]
    """A format, or ``auto`` to detect the format from the first bytes."""

_EXPECTED_SOURCE: Final = (
    "raw or qed (qemu-img convert can read the format that was found; to read the bytes unchanged, "
    "state the format raw)"
)
"""The end of the message about a source of a foreign format."""


def probe_format(path: str, expected: str = _EXPECTED_SOURCE) -> ImageFormat:
    """Return the format of a file or block device, detected from the first bytes.

    Args:
        path: The file or block device.
        expected: The end of the message about a foreign format, by default that for a source.

    Raises:
        UsageError: The file is an image of a foreign format, or is encrypted by LUKS.
        HostError: The file cannot be opened or read.
        ImageError: The file is neither a regular file nor a block device.
    """
    fd = open_raw(path, os.O_RDONLY)
    try:
        signature = os.pread(fd, SIGNATURE_BYTES, 0)
    except OSError as error:
        raise HostError.from_os(error, printable(path), "read") from error
    finally:
        os.close(fd)
    return format_of(signature, printable(path), expected)


def foreign_driver_of(path: str) -> str | None:
    """Return QEMU's name for the foreign format of a file; None if the format is raw or QED.

    Also returns None for a URL, for what is not a regular file or cannot be read, and for a file
    encrypted by LUKS.
    """
    start = None if is_url(path) else first_bytes(path)
    return None if start is None else foreign_driver(start)


def first_bytes(path: str) -> bytes | None:
    """Return the first `SIGNATURE_BYTES` of a regular local file, or fewer.

    None if the file cannot be read, or is not a regular file.
    """
    try:
        fd = open_regular(path, os.O_RDONLY)
    except QedError:
        return None
    try:
        return os.pread(fd, SIGNATURE_BYTES, 0)
    except OSError:
        return None
    finally:
        os.close(fd)


async def probe_any(
    path: str, remote: RemoteOptions, expected: str = _EXPECTED_SOURCE
) -> ImageFormat:
    """Return the format of a local file, as `probe_format` does, or of a URL.

    Args:
        path: The file, block device or URL.
        remote: How to read a URL.
        expected: The end of the message about a foreign format, as for `probe_format`.

    Raises:
        UsageError: As `probe_format`.  Or the URL is not valid or not permitted.
        HostError: The file cannot be opened or read.
        ImageError: The file is neither a regular file nor a block device.
    """
    if not is_url(path):
        return probe_format(path, expected)
    # Imported late, because it loads trio, which other users of this module do not need.
    from qedfuse.disk.lookup.imageopening import open_image  # noqa: PLC0415  late, see above

    async with open_image(path, None, remote) as file:
        return format_of(await file.pread(0, SIGNATURE_BYTES), file.name, expected)


def format_of(
    content: bytes | bytearray | memoryview, name: str, expected: str = _EXPECTED_SOURCE
) -> ImageFormat:
    """Return the format of a file, device or stream, detected from the first bytes.

    Args:
        content: The first `SIGNATURE_BYTES`, or all bytes if there are fewer.
        name: Name of the file in the message.
        expected: The end of the message, as for `probe_format`.

    Raises:
        UsageError: The bytes are those of a foreign image, or of a file encrypted by LUKS.
    """
    signature = bytes(content[:SIGNATURE_BYTES])
    if is_qed(signature):
        return "qed"
    found = "LUKS" if is_luks(signature) else foreign_format(signature)
    if found is not None:
        msg = f"{name}: format: found {found}, expected {expected}"
        raise UsageError(msg)
    return "raw"


def is_qed_image(signature: bytes | bytearray, image_format: FormatChoice, name: str) -> bool:
    """Return whether a command that only describes a file must treat it as QED.

    A file that is encrypted by LUKS counts as raw.  The bytes are examined only for ``auto``.

    Args:
        signature: The first `SIGNATURE_BYTES` of the file, or all bytes of a shorter file.
        image_format: The choice of the user.
        name: Name of the file in the message.

    Raises:
        NotQedError: The format is ``auto`` and the file is an image of a foreign format.
    """
    if image_format == "auto":
        found = foreign_format(signature)
        if found is not None:
            msg = f"{name}: found a {found} image, expected QED or raw"
            raise NotQedError(msg)
        return is_qed(signature)
    return image_format == "qed"
