"""The names of other files in the header of an image that has one of QEMU's formats.

QEMU gets backing files and data files as open descriptors, and does not look up their names.  So
even if QEMU read a header differently from this module, it would read only files that the policy
for backing files allows.  There is one exception: if a VMDK image consists of several files, QEMU
itself opens them (`qedfuse.foreign.vmdk`), within the sandbox.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ForeignError, HostError
from qedfuse.foreign.vmdk import DESCRIPTOR_START, read_descriptor, read_embedded_parent
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.header import parse_header
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_EXTENTS: Final = 512
"""Maximum number of extents in a chain: enough for 1 TiB in files of 2 GiB."""
RAW_DRIVERS: Final = ("raw", "file", "host_device")
"""Names of formats by which images state that their backing file is raw."""

_START_BYTES: Final = 4096
"""Number of bytes that are read at the start of a file, enough for the header fields used here."""

_QCOW2_EXTENSIONS_AT: Final = 72
"""Offset of the header extensions in version 2 of qcow2."""
_QCOW2_HEADER_LENGTH_AT: Final = 100
_EXTENSION_END: Final = 0
_EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
_EXTENSION_DATA_FILE: Final = 0x44415441
_QCOW2_EXTERNAL_DATA: Final = 1 << 2
"""The incompatible feature bit of an image whose data is in a file of its own."""
_MAX_EXTENSIONS: Final = 32
"""Maximum number of header extensions that are read."""

_MAX_NAME_BYTES: Final = 1023
"""Maximum length in bytes of the name of a file or of a format, as in QEMU for a backing file."""

_VHD_TYPE_AT: Final = 60
_VHD_DIFFERENCING: Final = 4


@dataclass(frozen=True, slots=True)
class Links:
    """The other files that an image names.

    Attributes:
        backing: Name of the backing file; empty if there is none.
        backing_driver: Format of the backing file; None if the image does not state it.  Always
            ``vmdk`` for a VMDK image.
        data_file: Name of the file that has the data of a qcow2 image; empty if there is none.
        extents: Names of the files in which a VMDK image stores its data, if it names such files.
    """

    backing: bytes = b""
    backing_driver: str | None = None
    data_file: bytes = b""
    extents: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        """Return whether the image names any file."""
        return bool(self.backing or self.data_file or self.extents)


def read_links(fd: int, driver: str, name: str) -> Links:
    """Return the names of other files in an image's header, or in the text descriptor of a VMDK.

    Args:
        fd: The open file.
        driver: The format of the image as QEMU calls it.
        name: Name of the image in messages.

    Raises:
        ForeignError: The image is encrypted, or its header cannot be used.
        ImageError: The image is QED, and its header is not valid.
        HostError: The host cannot read the file.
    """
    reader = _READERS.get(driver)
    if reader is None:
        return Links()
    try:
        return reader(fd, name)
    except OSError as error:
        raise HostError.from_os(error, name, "read") from error


def _qed(fd: int, name: str) -> Links:
    """Return the backing file of a QED image."""
    header = parse_header(os.pread(fd, HEADER_BYTES, 0), name)
    if not header.has_backing:
        return Links()
    backing = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
    return Links(backing, "raw" if header.backing_is_raw else None)


def _qcow(fd: int, name: str) -> Links:
    """Return the backing file of an image of version 1 of QCOW."""
    start = _read_start(fd, 48, name)
    _refuse_encrypted(start, 36, name)
    return Links(_qcow_backing(fd, start, name))


def _qcow2(fd: int, name: str) -> Links:
    """Return the backing file and the data file of a qcow2 image."""
    start = _read_start(fd, 104, name)
    _refuse_encrypted(start, 32, name)
    version = struct.unpack_from(">I", start, 4)[0]
    at, features = _QCOW2_EXTENSIONS_AT, 0
    if version >= 3:  # noqa: PLR2004  the version with features
        at = struct.unpack_from(">I", start, _QCOW2_HEADER_LENGTH_AT)[0]
        features = struct.unpack_from(">Q", start, 72)[0]
    extensions = _qcow2_extensions(fd, at)
    data_file = b""
    if features & _QCOW2_EXTERNAL_DATA:
        data_file = extensions.get(_EXTENSION_DATA_FILE, b"")
        if not data_file:
            msg = f"{name}: found no name of the file that has the data, expected one"
            raise ForeignError(msg)
    driver = extensions.get(_EXTENSION_BACKING_FORMAT)
    return Links(
        _qcow_backing(fd, start, name),
        None if driver is None else driver.decode("ascii", "backslashreplace"),
        data_file,
    )


def _qcow2_extensions(fd: int, at: int) -> dict[int, bytes]:
    """Return the contents of the header extensions from ``at`` on, by type; leave out long ones."""
    found: dict[int, bytes] = {}
    for _ in range(_MAX_EXTENSIONS):
        head = os.pread(fd, 8, at)
        if len(head) < 8:  # noqa: PLR2004  type and length
            break
        kind, length = struct.unpack(">II", head)
        if kind == _EXTENSION_END:
            break
        if length <= _MAX_NAME_BYTES:
            found.setdefault(kind, os.pread(fd, length, at + 8))
        at += 8 + -(-length // 8) * 8
    return found


def _qcow_backing(fd: int, start: bytes, name: str) -> bytes:
    """Return the name of the backing file of an image of QCOW or qcow2; empty if it has none."""
    offset, size = struct.unpack_from(">QI", start, 8)
    if not offset or not size:
        return b""
    if size > _MAX_NAME_BYTES or offset >= 1 << 63:
        msg = (
            f"{name}: backing file name: found {size} bytes at {offset}, "
            f"expected at most {_MAX_NAME_BYTES}"
        )
        raise ForeignError(msg)
    backing = os.pread(fd, size, offset)
    if len(backing) < size:
        msg = f"{name}: backing file name: found {len(backing)} bytes, expected {size}"
        raise ForeignError(msg)
    return backing


def _vmdk(fd: int, name: str) -> Links:
    """Return the parent and the extents of a VMDK image."""
    start = _read_start(fd, 64, name)
    if start.startswith(DESCRIPTOR_START):
        descriptor = read_descriptor(fd, name)
        return Links(descriptor.parent, "vmdk", extents=descriptor.extents)
    return Links(read_embedded_parent(fd, start, name), "vmdk")


def _vpc(fd: int, name: str) -> Links:
    """Return no names; refuse an image that has a parent, because QEMU would ignore the parent."""
    start = os.pread(fd, _START_BYTES, 0)
    kind = start[_VHD_TYPE_AT : _VHD_TYPE_AT + 4]
    if start.startswith(b"conectix") and int.from_bytes(kind, "big") == _VHD_DIFFERENCING:
        msg = f"{name}: found a differencing VHD image, expected one without a parent"
        raise ForeignError(msg)
    return Links()


def _read_start(fd: int, size: int, name: str) -> bytes:
    """Return the first bytes of a file, at least ``size``; a shorter file is refused."""
    start = os.pread(fd, _START_BYTES, 0)
    if len(start) < size:
        msg = f"{name}: found {len(start)} bytes, expected a header of {size}"
        raise ForeignError(msg)
    return start


def _refuse_encrypted(start: bytes, at: int, name: str) -> None:
    """Refuse an image if the 32 bits at offset ``at``, its method of encryption, are not 0."""
    method = struct.unpack_from(">I", start, at)[0]
    if method:
        kinds = {1: "AES", 2: "LUKS"}
        found = kinds.get(method, printable(str(method)))
        msg = f"{name}: found an encrypted image ({found}), expected one without encryption"
        raise ForeignError(msg)


_READERS: Final[dict[str, Callable[[int, str], Links]]] = {
    "qed": _qed,
    "qcow": _qcow,
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vpc": _vpc,
}
"""For each format the function that reads the names; other formats name no files."""
