"""What the mount's C extension needs to read and write a file without Python code.

See ``_cachedread.c`` and ``_inplacewrite.c`` in ``mount/fuse``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.readpolicy import ReadPolicy


class CheckedUnits(NamedTuple):
    """Which parts of a local file the extension may read; the file caches a remote file.

    The file is divided into *units*, whose length is a power of two, and a unit into 64 blocks.
    The result of a read may be used only if all of its bytes were in the page cache, and if each
    block that reads as zeros is marked in ``zero_blocks``.  An unmarked block of zeros may be a
    hole; see `qedfuse.remote.localdata`.

    Attributes:
        ready: A byte for each unit.  0: the extension must not read the unit.  1: it may.  2: it
            may, and all pages of the unit are valid and not waiting to be written.  (A page is not
            valid while it is being read, and after a failed write.)
        zero_blocks: For each unit a mask of 64 bits: bit i is set if block i of the unit is known
            to be all zeros.  Empty if the host had no memory for the masks; then all bits count
            as clear.
        unit_bits: Binary logarithm of the number of bytes in a unit.
        content_bytes: Offset at which the readable part of the file ends.
        file_bytes: Length of the file while one process uses it; it is one byte longer while
            several do.  If the file has any other length after a read, the bytes must not be used.
        address: Address at which the file is mapped, for mincore(2).
        forget: Called with the first and the last unit of a read that failed; makes all units from
            the first to the last not ready.
    """

    ready: bytearray
    zero_blocks: memoryview
    unit_bits: int
    content_bytes: int
    file_bytes: int
    address: int
    forget: Callable[[int, int], object]


class PageSource(NamedTuple):
    """A file that the extension may read.

    Attributes:
        policy: Decides whether a read is tried.
        fd: The descriptor.
        units: Which parts of the file may be read; None if the whole file may be read.
        runs: Which other files store the bytes of this file; None if this file does.  With runs,
            ``policy`` and ``fd`` are not used.
        flags: Flags of preadv2(2) for the reads, from `inline_flags`.
    """

    policy: ReadPolicy
    fd: int
    units: CheckedUnits | None = None
    runs: StoredRuns | None = None
    flags: int = os.RWF_NOWAIT


class Contended(Protocol):
    """An object that knows whether a change of a file would have to wait (`InodeLock`).

    Attributes:
        contention: Number of reasons why a change would have to wait now.
    """

    contention: int


class WriteTarget(NamedTuple):
    """A file to which the extension may write while a write would not wait.

    Attributes:
        fd: The descriptor.
        inode: The lock of the file's inode.  The extension writes only while ``contention`` is 0.
        is_short: Returns whether a write of the given number of bytes counts as short; longer ones
            are left to Python code.  Not called for a write of `ALWAYS_SHORT_WRITE_BYTES` or less.
        record_write: Must be called after each write, with its length in bytes and its time in
            seconds.
    """

    fd: int
    inode: Contended
    is_short: Callable[[int], bool]
    record_write: Callable[[int, float], None]


class StoredRuns(NamedTuple):
    """Where local files store the bytes of a file that has no descriptor of its own.

    Attributes:
        cells: Numbers of 64 bits: the number of runs, the offset at which the last run ends, and
            then the two arrays of `qedfuse.foreign.runmap.RunMap`, each with room for ``capacity``
            runs.  Runs are added in place.
        capacity: Maximum number of runs.
        files: The files to which the runs refer, by number.
    """

    cells: memoryview
    capacity: int
    files: tuple[PageSource, ...]
