"""How the mount's extension reads a file by itself (``mount/fuse/_cachedread.c``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.readpolicy import ReadPolicy


class CheckedUnits(NamedTuple):
    """The parts of a file that may be read, for a file of the cache for servers.

    A *unit* is a power of two of bytes.  A read must find all of its bytes in the page cache, and
    no block of zeros that may be a hole; `qedfuse.remote.localdata` says why.

    Attributes:
        ready: For each unit 1 if its bytes may be read, otherwise 0.  The extension looks at the
            object before each read, so its length must not change.
        zero_blocks: For each unit a number of 64 bits, in which the bits of the blocks are set that
            are known to be all zeros; perhaps not for all units.
        unit_bits: Binary logarithm of the number of bytes in a unit.
        content_bytes: Where the bytes end that may be read.
        file_bytes: The length of the file while one process uses it, and one byte less than while
            several do.  A file that has another length after a read was cut, and the bytes that
            were read do not count.
        address: Where the file is mapped.  While several processes use the file, a read is only
            tried if mincore(2) says that all of it is in the page cache.
        forget: Called with the first and the last unit of a read that failed, which makes them not
            ready.
    """

    ready: bytearray
    zero_blocks: memoryview
    unit_bits: int
    content_bytes: int
    file_bytes: int
    address: int
    forget: Callable[[int, int], object]


class PageSource(NamedTuple):
    """A file whose pages answer reads.

    Attributes:
        policy: Decides whether a read is tried.
        fd: The descriptor.
        units: Which parts of the file may be read; None if all of it may.
    """

    policy: ReadPolicy
    fd: int
    units: CheckedUnits | None = None
