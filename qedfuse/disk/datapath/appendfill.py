"""Filling the rest of a new cluster with zeros, for programs that append and flush.

A new cluster at the end of the file is a hole of the host's file system, and reads as zeros.  So
a write to a part of the cluster need only write the guest's data.  But each later write to the
rest of the hole makes the host allocate blocks, and the next flush must commit the allocation to
the host's journal.  A program that appends 4 KiB at a time and flushes each time, as a database
or the journal of a file system does, waits for 16 such flushes in each cluster of 64 KiB.  On
ext4 such a flush takes about 250 µs; a flush of blocks that the host has already allocated takes
about 120 µs.

So if a program that appends and flushes begins a cluster of at most 64 KiB, all of the cluster is
written with the first write.  Other programs would gain nothing: a program that does not flush
never waits for such an allocation, and a program that writes at random does not soon write to the
same cluster again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_MAX_BYTES: Final = 1 << 16
"""Maximum length in bytes of a run that is filled for a program that appends.

Filling a longer run would make its first write much slower than a write of the guest's data alone.
"""


class AppendFill:
    """Recognizes writes of a program that appends and flushes."""

    def __init__(self, writeback: MetadataWriteback) -> None:
        """Observe the flushes of ``writeback``."""
        self._writeback = writeback
        self._last_cycle = writeback.cycles

    def may_leave_hole(
        self, run: Run, data_offset: int, data_bytes: int, *, shows_base: bool
    ) -> bool:
        """Return whether to write only the guest's data to a run of new clusters.

        If the result is False, the caller must write all of the run.

        The rest of a run can stay a hole only if it reads as zeros already and needs no data of the
        base.  For any other run the result is False.

        If the rest can stay a hole, the result is False if all of the following hold, as for a
        program that appends and flushes, and True otherwise:

        - A cycle of `MetadataWriteback` has begun since the previous call for a run whose
          rest could stay a hole.
        - The guest writes data, and does not only allocate clusters.
        - The guest's data begins at the start of the run.
        - The run has at most `_MAX_BYTES`.

        The caller must call this method at most once for each run.

        Args:
            run: The run of new clusters.
            data_offset: Offset in bytes of the guest's data within the run.
            data_bytes: Bytes of the guest's data; 0 if clusters are only allocated.
            shows_base: Whether the rest of the run must get data of the base.
        """
        if not run.never_written or shows_base:
            return False
        cycle = self._writeback.cycles
        flushed = cycle != self._last_cycle
        self._last_cycle = cycle
        return not flushed or data_offset > 0 or not data_bytes or run.length > _MAX_BYTES
