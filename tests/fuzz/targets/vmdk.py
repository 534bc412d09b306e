"""Descriptors of VMDK images: qedfuse knows every extent that QEMU would open.

QEMU finds extents with sscanf(3), so the target calls the sscanf of the C library.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from qedfuse.errors import ForeignError
from qedfuse.foreign.vmdk import read_descriptor, read_embedded_parent
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target, assert_line

_FORMAT: Final = b'%9s %lld %9s "%511[^\n\r"]" %lld'
"""How QEMU reads a line with an extent (``vmdk_parse_extents``)."""
_MAX_BYTES: Final = (1 << 20) - 1
_DATA_TYPES: Final = (b"FLAT", b"VMFS", b"SPARSE", b"VMFSSPARSE", b"SESPARSE")
_libc: Final = ctypes.CDLL(None)


def _names_for_qemu(text: bytes) -> set[bytes]:
    """Return the names of the extents that QEMU opens."""
    names = set()
    rest = text[:_MAX_BYTES].partition(b"\0")[0]
    while rest:
        access, kind = ctypes.create_string_buffer(11), ctypes.create_string_buffer(11)
        name = ctypes.create_string_buffer(512)
        sectors, offset = ctypes.c_longlong(-1), ctypes.c_longlong(-1)
        found = _libc.sscanf(
            *(rest, _FORMAT, access, ctypes.byref(sectors), kind, name, ctypes.byref(offset))
        )
        if found >= 4 and access.value == b"RW" and sectors.value > 0 and kind.value in _DATA_TYPES:
            names.add(name.value)
        rest = rest.partition(b"\n")[2]
    return names


def check(data: bytes) -> None:
    """Read a descriptor from a file of its own, and the parent in an image."""
    path = put(scratch("vmdk") / "disk.vmdk", data)
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            descriptor = read_descriptor(fd, "disk.vmdk")
        except ForeignError as error:
            assert_line(error)
        else:
            assert _names_for_qemu(data) <= set(descriptor.extents), "QEMU would open more"
            assert all(0 < len(name) < 512 for name in descriptor.extents)
            assert len(descriptor.parent) < 4096
        try:
            parent = read_embedded_parent(fd, data[:64], "disk.vmdk")
        except ForeignError as error:
            assert_line(error)
        else:
            assert len(parent) < 4096
    finally:
        os.close(fd)


_DESCRIPTOR: Final = b"""# Disk DescriptorFile
version=1
CID=7d3a2b1c
parentCID=ffffffff
createType="twoGbMaxExtentSparse"

# Extent description
RW 4192256 SPARSE "disk-s001.vmdk"
RW 2048 FLAT "disk-flat.vmdk" 0

# The Disk Data Base
#DDB
ddb.virtualHWVersion = "4"
"""


def seeds() -> list[bytes]:
    """Return descriptors with and without a parent, and images with a descriptor inside."""
    child = _DESCRIPTOR.replace(b"ffffffff", b"12345678")
    child = child.replace(b"createType", b'parentFileNameHint="base.vmdk"\ncreateType')
    start = b"KDMV" + bytes(8) + (2048).to_bytes(8, "little")
    return [_DESCRIPTOR, child, start.ljust(512, b"\0") + child, b"COWD" + bytes(508) + child]


TARGET: Final = Target(
    check,
    seeds,
    (
        b"RW ",
        b"FLAT",
        b"SPARSE",
        b"VMFS",
        b' "x" 0',
        b"\n",
        b"\r",
        b"\x00",
        b"ZERO",
        b"0x10 ",
        b"\x0b",
        b"NOACCESS ",
        b"# ",
        b"parentCID=",
        b'parentFileNameHint="',
        b"\t",
        b"=",
        b"KDMV",
    ),
    max_bytes=8192,
)
