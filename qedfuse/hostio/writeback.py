"""Having the host write to its disk early, so that a later fsync has little left to wait for."""

from __future__ import annotations

import ctypes
from typing import Final

_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range: Final = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Begin to write a range of a file, in bytes, to the disk; nothing is durable by that.

    It may wait while the disk's queue is full.  What goes wrong is told by fsync later.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, length, _WRITE)
