"""Filling the rest of a new cluster with zeros, for programs that flush often.

A new cluster at the end of the file is a hole of the host's file system, and reads as zeros.  So
a write to a part of the cluster need only write the guest's data.  But each later write to the
rest of the hole makes the host allocate blocks, and the next flush must commit the allocation to
the host's journal.  A program that writes 4 KiB at a time and flushes each time, as a database or
the journal of a file system does, waits for 16 such flushes in each cluster of 64 KiB, whether it
appends or writes at random.  On ext4 such a flush takes about 250 µs; a flush of blocks that the
host has already allocated takes about 120 µs.

So when a write gets the first new clusters after a flush, the rest of these clusters is filled with
zeros.  New clusters of later writes before the next flush stay holes, because zeros in them would
cost time and space, and would gain little: a program that writes to many clusters before it flushes
waits for only one commit of all their allocations.

The guest's data is written first.  The zeros change no byte that a guest can read, so the guest's
write succeeds even if the host has space for the data only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile

_MAX_BYTES: Final = 1 << 16
"""Maximum length in bytes of a run that is filled.

Filling a longer run would make its first write much slower than a write of the guest's data alone.
"""

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

        The caller must have written the guest's data to the run, and the rest must read as zeros
        already (`Run.never_written`) and need no data of the base.

        Writes zeros if all of the following hold:

        - A cycle of `MetadataWriteback` has begun since the previous call or, for the first call,
          since the opening.  Calls for a run that the guest's data fills completely do not count.
        - The guest writes data, and does not only allocate clusters.
        - The run has at most `_MAX_BYTES`.

        Never blocks, and raises no error.  If zeros cannot be written without blocking, or if the
        host refuses them, as when it is full, some or all of the rest stays a hole.

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
