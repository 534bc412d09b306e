"""Finding out whether the page cache has a range of a file, without reading the range."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

_libc: Final = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL, because these calls do not wait
_mmap = _libc.mmap
_mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_int64,
)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Residency:
    """A mapping of a file, through which mincore(2) reports what the page cache has of the file.

    A read with ``RWF_NOWAIT`` could not replace mincore(2), because such a read makes the kernel
    fetch missing pages from the disk, and succeeds in a hole.

    Attributes:
        address: Address at which the file is mapped; 0 after `close`.
    """

    def __init__(self, fd: int, length: int) -> None:
        """Map the first ``length`` bytes of a file, at least 1.

        The user of this process must own the file or have permission to write to it.  For other
        files mincore(2) reports every page as present.
        """
        address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address = address
        self._length = length

    def has_range(self, offset: int, length: int) -> bool:
        """Return whether the page cache has all pages of a range, which must be mapped.

        Returns False for a hole that no program has read, if mincore(2) fails, or after `close`.
        """
        start = offset & -mmap.PAGESIZE
        size = offset + length - start
        found = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if not self.address or _mincore(self.address + start, size, found):
            return False
        return b"\0" not in found.raw

    def close(self) -> None:
        """Remove the mapping; a second call does nothing."""
        address, self.address = self.address, 0
        if address:
            _munmap(address, self._length)
