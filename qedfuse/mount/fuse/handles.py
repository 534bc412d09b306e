"""The bits of file handles.

A file handle is the inode number of the disk together with the `HANDLE_FLAGS` that apply.

The kernel sends a write from its cache with any handle of the file that may write.  So the flags of
this handle have no meaning for the write, and the extension (`_dataops.c`) clears `HANDLE_DIRECT`
and `HANDLE_WRITER` before pyfuse3 gets the write.
"""

from __future__ import annotations

from typing import Final

HANDLE_DIRECT: Final = 1 << 62
"""Bit of a file handle: the handle was opened with O_DIRECT, and the mount lacks ``direct_io``."""
HANDLE_WRITER: Final = 1 << 61
"""Bit of a file handle: the handle was opened with an access mode other than O_RDONLY."""
HANDLE_SYNC: Final = 1 << 60
"""Bit of a file handle: each write must be durable before the server replies."""
HANDLE_FLAGS: Final = HANDLE_DIRECT | HANDLE_WRITER | HANDLE_SYNC
FAST_LOOKUP_MASK: Final = ~(HANDLE_FLAGS & ~HANDLE_SYNC)
"""The bits of a handle by which `FastRequests.read` and `write` look up the disk.

The mask keeps `HANDLE_SYNC`.  No inode number has this bit, so the lookup finds no disk for a
handle with `HANDLE_SYNC`, and its reads and writes take the slow path."""
