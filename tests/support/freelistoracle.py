"""The test oracle for persistent free lists, independent of the code under test.

If the feature bit says that there is a list, it must be complete and true: a program that opens
the image allocates the clusters that the list names.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.ondisk.header import Header

_DESCRIPTOR: Final = struct.Struct("<8sLLQQQQQ")
_DESCRIPTOR_OFFSET: Final = 3584
_DESCRIPTOR_BYTES: Final = 512


def free_list_problems(content: bytes, header: Header, owned: NDArray[np.bool_]) -> list[str]:
    """Return what is wrong with the list of an image whose feature bit is set.

    ``owned`` has for each cluster of the file whether a table refers to it, or whether it
    belongs to a table or the header; all others are free, and the list must name them.
    """
    sector = content[_DESCRIPTOR_OFFSET : _DESCRIPTOR_OFFSET + _DESCRIPTOR_BYTES]
    magic, version, list_crc, offset, clusters, runs, free, size = _DESCRIPTOR.unpack_from(sector)
    (crc,) = struct.unpack_from("<L", sector, _DESCRIPTOR_BYTES - 4)
    if (magic, version) != (b"QEDFLIST", 1) or crc != zlib.crc32(sector[:-4]):
        return ["free list: the bit is set and the descriptor is not good"]
    if header.need_check:
        return ["free list: there is one, and NEED_CHECK is set"]
    if size != len(content):
        return [f"free list: it is for a file of {size} bytes, this one has {len(content)}"]
    body = b""
    for _ in range(clusters):
        head = content[offset : offset + 32]
        body += content[offset + 32 : offset + 32 + 16 * int.from_bytes(head[16:20], "little")]
        offset = int.from_bytes(head[8:16], "little")
    if zlib.crc32(body) != list_crc or len(body) != 16 * runs:
        return ["free list: the bit is set and the runs are not good"]
    listed = np.zeros(len(owned), np.intp)
    for first, count in struct.iter_unpack("<QQ", body):
        listed[first : first + count] += 1
    if listed.sum() != free or (listed != ~owned).any():
        return ["free list: it is good and names other clusters than those that are free"]
    return []
