"""Which bytes of a file are in the page cache, without bringing others there."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

_libc: Final = ctypes.PyDLL(None, use_errno=True)  # calls that do not wait, with the GIL held
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
_FAILED: Final = ctypes.c_void_p(-1).value


class Residency:
    """A mapping of a file that is never read, by which mincore(2) looks into the page cache.

    A read with ``RWF_NOWAIT`` of bytes that are not there would make the kernel fetch them, and
    would find zeros in a hole.

    Attributes:
        address: Where the file is mapped; 0 after `close`.
    """

    def __init__(self, fd: int, length: int) -> None:
        """Map the first ``length`` bytes of a file of this user, at least one.

        Raises:
            OSError: The host refused.
        """
        address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, _FAILED):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address = address
        self._length = length

    def has_range(self, offset: int, length: int) -> bool:
        """Return whether all pages of a range of the file, which is not empty, are in the cache.

        The pages of a hole that no program has read are not.
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
