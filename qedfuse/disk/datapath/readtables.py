"""The objects of a disk that the mount's extension uses to answer requests itself.

``_readview.c`` finds data as `qedfuse.disk.datapath.fastpath.FastPath.locate` does, but without
Python code.  So the extension keeps references to the objects that `FastPath` uses.  While the disk
is open, they are never replaced by others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.epochs import Epochs
    from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.pagesource import Contended, PageSource


class InPlaceWrites(NamedTuple):
    """What ``_inplacewrite.c`` needs to write to clusters that the top image has allocated.

    The extension makes a write only if it is short, ``guard`` has prepared the image for changes,
    ``writeback`` has no failure, and the contention of ``inode`` is 0.

    Attributes:
        fd: The descriptor of the top image.
        inode: Counts the reasons for which a change of the top image might wait (`InodeLock`).
        is_short: Returns whether a write of a number of bytes counts as short (`InlinePolicy`).
        guard: The first-write guard.
        writeback: The write-back of the tables.
        record: Called after each such write with its length in bytes and its time in seconds.
    """

    fd: int
    inode: Contended
    is_short: Callable[[int], bool]
    guard: FirstWriteGuard
    writeback: MetadataWriteback
    record: Callable[[int, float], None]


class SeekTables(NamedTuple):
    """What ``_seek.c`` needs to search the tables of the top image for data and holes.

    Attributes:
        cache_key: First part of the keys of slices of the top image (`TableCache.key`); the second
            part is the file offset of the slice.
        table_bits: Binary logarithm of the number of entries in a table.
    """

    cache_key: int
    table_bits: int


class ReadTables(NamedTuple):
    """The objects with which ``_readview.c`` finds data in a chain.

    Attributes:
        layer: The top image; its header has the size of the disk.
        slice_keys: The keys of slices, by the slice's number (`QedLayer.slice_keys`).
        get_slice: Returns a slice by its key; None if it is not in memory (`TableCache.get`).
        codes_key: First part of the keys of slices that say where backing files hold data
            (`FlattenedBacking.store_key`); the second part is the slice's number.  None without
            backing files.
        files: For each file of the chain, by depth, its `PageSource`; None if the extension must
            not read it.
        cluster_bits: Binary logarithm of the cluster size in bytes.
        slice_bits: Binary logarithm of the number of entries in a slice.
        epochs: A read that waits for the host enters an epoch (`Epochs`).
        file_reads: The cells of `FileReads`, in which the extension counts its reads.
        window_start: Guest offset of the range to which reads are confined (`DiskWindow`).
        window_bytes: Length of that range; -1 for the whole disk.
        writes: For writes to allocated clusters; None if the extension must not write.
        seeks: For searches of data and holes; None if the disk has a base.
    """

    layer: QedLayer
    slice_keys: dict[int, tuple[int, int] | None]
    get_slice: Callable[[tuple[int, int]], Slice | None]
    codes_key: int | None
    files: tuple[PageSource | None, ...]
    cluster_bits: int
    slice_bits: int
    epochs: Epochs
    file_reads: array[int]
    window_start: int = 0
    window_bytes: int = -1
    writes: InPlaceWrites | None = None
    seeks: SeekTables | None = None
