"""Filling the rest of a new cluster with zeros, for programs that flush often.

A new cluster at the end of the file is a hole of the host's file system.  A write to a part of it
need only write the guest's data.  But each later write to the rest makes the host allocate blocks,
and the next flush must commit the allocation to the host's journal.  A program that writes 4 KiB at
a time and flushes each time waits for 16 such flushes in each cluster of 64 KiB.  On ext4 such a
flush takes about 250 µs, and one without an allocation about 120 µs.

So when a write gets the first new clusters after a flush, the rest of these clusters is filled with
zeros.  Later writes before the next flush leave holes in their new clusters, because one flush then
commits the allocations of many writes.

The guest's data is written first.  So the guest's write succeeds even if the host has space for the
data only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile

_MAX_BYTES: Final = 1 << 16
"""Maximum length in bytes of a run that is filled; a longer one would slow its first write."""

_ZEROS: Final = memoryview(bytes(_MAX_BYTES))


class ZeroFill:
    """Fills up, with zeros, the first run of new clusters that a write gets after a flush."""

    def __init__(self, file: HostFile, writeback: MetadataWriteback) -> None:
        """Fill clusters of ``file``, and observe the flushes of ``writeback``."""
        self._try_write = file.try_write
        self._writeback = writeback
        self._last_cycle = writeback.cycles

    def fill_rest(self, run: Run, data_offset: int, data_bytes: int) -> None:
        """Write zeros to the rest of a run of new clusters, if that is likely to save time later.

        The caller must have written the guest's data to the run.  The rest must read as zeros
        already (`Run.never_written`) and need no data of the base.

        Fills the rest only if the guest writes data, if the run has at most `_MAX_BYTES`, and if
        this is the first call since the beginning of a cycle of `MetadataWriteback`.  A call counts
        only if its run has a rest.  Never blocks, and raises no error: the rest may stay a hole.

        Args:
            run: The run of new clusters.
            data_offset: Offset in bytes of the guest's data within the run.
            data_bytes: Bytes of the guest's data; 0 if clusters are only allocated.
        """
        if data_bytes == run.length:
            return
        cycle = self._writeback.cycles
        is_first = cycle != self._last_cycle
        self._last_cycle = cycle
        if not is_first or not data_bytes or run.length > _MAX_BYTES:
            return
        data_end = data_offset + data_bytes
        if data_offset:
            self._try_write(run.offset, _ZEROS[:data_offset])
        if data_end < run.length:
            self._try_write(run.offset + data_end, _ZEROS[: run.length - data_end])
