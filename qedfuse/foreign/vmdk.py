"""The descriptor of a VMDK image: the names of its parent and of the extents that QEMU opens.

A descriptor may be a file of its own.  QEMU then searches it for names of extents, and skips each
line that it does not understand.  If this module also skipped lines, it might skip one that QEMU
understands, and QEMU would open a file that was never checked.  So such a descriptor is refused
unless every line has one of the forms below, which QEMU and this module read alike.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from qedfuse.errors import ForeignError
from qedfuse.text import printable

DESCRIPTOR_START: Final = b"# Disk DescriptorFile"
"""The first bytes of a descriptor that is a file of its own."""
_IMAGE_STARTS: Final = (b"KDMV", b"COWD")
"""The first bytes of an extent with a binary header."""

_SECTOR_BYTES: Final = 512
_MAX_EMBEDDED_DESCRIPTOR_BYTES: Final = 20 * _SECTOR_BYTES
"""Maximum length of a descriptor inside an image; the descriptor begins at the second sector."""
_MAX_DESCRIPTOR_BYTES: Final = (1 << 20) - 1
"""Maximum length of a descriptor in a file of its own; QEMU does not read what follows."""
_MAX_PARENT_NAME_BYTES: Final = 4095
"""Maximum length of the name of a parent; QEMU opens no image with a longer one."""
_MAX_SHOWN_BYTES: Final = 60

_COMMENT: Final = re.compile(rb"[ \t]*(?:#[^\x00-\x08\x0a-\x1f]*)?")
_FIELD: Final = re.compile(
    rb'[ \t]*([A-Za-z][\w.]*)[ \t]*=[ \t]*("[^\x00-\x1f"]*"|[^\x00-\x20"]*)[ \t]*'
)
_ACCESS: Final = re.compile(rb"[ \t]*(?:RW|RDONLY|NOACCESS)(?![^ \t])")
_EXTENT: Final = re.compile(
    rb"[ \t]*RW[ \t]+0*[1-9][0-9]{0,15}[ \t]+"
    rb'(?:FLAT[ \t]+"([^\x00-\x1f"]{1,511})"[ \t]+[0-9]{1,16}'
    rb'|(?:SPARSE|VMFS|VMFSSPARSE|SESPARSE)[ \t]+"([^\x00-\x1f"]{1,511})")[ \t]*'
)
"""The line of an extent that QEMU opens.  QEMU skips extents with other access or of type ZERO, so
the disk that it serves lacks their sectors.  Therefore such lines are refused."""

_PARENT: Final = b'parentFileNameHint="'
_PARENT_ID: Final = re.compile(rb'parentCID[ \t]*=[ \t]*"?([^\s"]*)')
_NO_PARENT: Final = b"ffffffff"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The files that a descriptor in a file of its own names.

    Attributes:
        parent: Name of the parent; empty if there is none.
        extents: Names of the extents without repetitions, at least one.
    """

    parent: bytes
    extents: tuple[bytes, ...]


def read_descriptor(fd: int, name: str) -> Descriptor:
    """Return the names in a descriptor that is a file of its own.

    Args:
        fd: The open file.
        name: Name of the file in messages.

    Raises:
        ForeignError: The descriptor is not valid, or QEMU might read it in another way.
        OSError: The host cannot read the file.
    """
    text = _read(fd, _MAX_DESCRIPTOR_BYTES + 1, 0)
    if len(text) > _MAX_DESCRIPTOR_BYTES:
        msg = (
            f"{name}: found a descriptor of more than {_MAX_DESCRIPTOR_BYTES} bytes, "
            "expected a shorter one"
        )
        raise ForeignError(msg)
    extents: dict[bytes, None] = {}
    is_after_empty = False
    # QEMU fills the last sector with zeros when it writes a descriptor.
    for number, raw_line in enumerate(text.rstrip(b"\0").split(b"\n"), 1):
        line = raw_line.removesuffix(b"\r")
        extent = _EXTENT.fullmatch(line)
        if extent and is_after_empty:
            msg = (
                f"{name}: line {number} of the descriptor: found an extent after an empty line, "
                "expected a comment between them, because QEMU would read the extent twice"
            )
            raise ForeignError(msg)
        is_after_empty = not line.strip()
        if extent:
            extents[extent[1] or extent[2]] = None
        elif not (_COMMENT.fullmatch(line) or (_FIELD.fullmatch(line) and not _ACCESS.match(line))):
            shown = printable(line[:_MAX_SHOWN_BYTES])
            msg = (
                f"{name}: line {number} of the descriptor: found '{shown}', "
                "expected a comment, a field, or an extent of type FLAT, SPARSE, VMFS, VMFSSPARSE "
                "or SESPARSE with access RW"
            )
            raise ForeignError(msg)
    if not extents:
        msg = f"{name}: found a descriptor without extents, expected at least one"
        raise ForeignError(msg)
    return Descriptor(_parent(text, name), tuple(extents))


def read_embedded_parent(fd: int, start: bytes, name: str) -> bytes:
    """Return the name of the parent in the descriptor inside an image; empty if there is none.

    Args:
        fd: The open file.
        start: The first bytes of the file.
        name: Name of the file in messages.

    Raises:
        ForeignError: The file has no VMDK header, or has a descriptor that is refused.
        OSError: The host cannot read the file.
    """
    if not start.startswith(_IMAGE_STARTS):
        msg = (
            f"{name}: found '{printable(start[:4])}' at the start of a VMDK image, "
            f"expected KDMV, COWD or '{DESCRIPTOR_START.decode()}'"
        )
        raise ForeignError(msg)
    refuse_hidden_descriptor(start, name)
    text = _read(fd, _MAX_EMBEDDED_DESCRIPTOR_BYTES, _SECTOR_BYTES)
    return _parent(text.partition(b"\0")[0], name)


def refuse_hidden_descriptor(start: bytes, name: str) -> None:
    """Refuse a VMDK extent of capacity 0, which QEMU would read as a list of further extents.

    Args:
        start: The first bytes of the file.
        name: Name of the file in messages.

    Raises:
        ForeignError: The file is such an extent.
    """
    if start.startswith(b"KDMV") and not any(start[12:20]):
        msg = f"{name}: header field capacity: found 0, expected the size of the disk"
        raise ForeignError(msg)


def _parent(text: bytes, name: str) -> bytes:
    """Return the name of the parent in a descriptor; empty if there is none."""
    _, key, rest = text.partition(_PARENT)
    parent, quote, _ = rest.partition(b'"')
    # The beginning of a name is the name of another file, so a name is not cut off.
    if len(parent) > _MAX_PARENT_NAME_BYTES:
        msg = (
            f"{name}: parentFileNameHint: found a name of {len(parent)} bytes, "
            f"expected at most {_MAX_PARENT_NAME_BYTES}"
        )
        raise ForeignError(msg)
    if key and not quote:
        msg = f"{name}: parentFileNameHint: found a name without a quotation mark after it"
        raise ForeignError(msg)
    identifier = _PARENT_ID.search(text)
    if not parent and identifier and identifier[1].lower() != _NO_PARENT:
        msg = (
            f"{name}: found parentCID={printable(identifier[1][:_MAX_SHOWN_BYTES])} and no "
            f'{_PARENT.decode()}NAME", expected both or parentCID={_NO_PARENT.decode()}'
        )
        raise ForeignError(msg)
    return parent


def _read(fd: int, length: int, offset: int) -> bytes:
    """Return ``length`` bytes of a file; fewer only where the file ends."""
    data = b""
    while len(data) < length:
        part = os.pread(fd, length - len(data), offset + len(data))
        if not part:
            break
        data += part
    return data
