"""Repair: make the tables of an image consistent, and keep as much of the guest's data as possible.

What is done for each kind of damage, and why:

- If several entries refer to one data cluster, the entry with the lowest guest offset keeps the
  cluster.  Each other entry gets a copy of it, so that every guest offset reads as before.
- If two L2 tables overlap, the table at the higher file offset moves to the end of the file.  A
  table stays if it overlaps only tables that move.  If two L1 entries point to the same table, the
  entry with the higher guest offset gets a copy of the table.  After that, two tables refer to the
  same data clusters, so the clusters are copied as above.
- If a cluster is both data and part of an L2 table, the table moves and the data stays.  One of the
  two entries is wrong, and the tables do not show which.  If the L1 entry is wrong, the cluster
  holds guest data only: clearing the entry of the data would lose the data, and correcting the
  table in place would overwrite it.  The range of the data is reported, because its entry may be
  the wrong one.
- A table that the end of the file cuts short keeps the entries that are in the file
  (`qedfuse.check.shorttables`).  A data cluster that is cut short is completed with zeros.
- An entry is cleared if it points outside the file, is unaligned, has reserved bits, or points to
  the header or the L1 table.  Such an entry refers to no data of the guest.
- In an overlay, an L2 entry that is lost in one of these ways becomes a zero cluster, and a lost L1
  entry gets a new table of zero clusters.  If these entries became unallocated, the guest would
  read old data of the backing file as if it were valid.
- An entry past the end of the disk is cleared if its cluster or its table would have to be copied.
  Otherwise a crafted image of a small disk could make the copies fill the host's file system.

Leaked clusters stay leaked.  The persistent free list is dropped whenever the repair changes the
image or the list is invalid.  The clusters of a dropped list count as leaked, until the image is
opened for writing and its tables are scanned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.check.checker import check_image
from qedfuse.check.findings import RepairPlan
from qedfuse.check.rewrite import DryRunRewriter, Rewriter
from qedfuse.check.tablerepair import TableRepair

if TYPE_CHECKING:
    from qedfuse.check.findings import CheckReport, LostRange
    from qedfuse.check.rewrite import Save
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The result of a repair.

    Attributes:
        lost: Ranges whose data is lost or possibly wrong, in the order in which they were found.
        copied: Number of data clusters that were copied.
        cleared: Number of table entries that were cleared.
        after: The check of the repaired image.
    """

    lost: tuple[LostRange, ...]
    copied: int
    cleared: int
    after: CheckReport


async def repair_image(file: HostFile, header: Header) -> RepairReport:
    """Repair the tables of an image that is open for writing and locked.

    After a crash at any time the image can be repaired again, because of the order of the writes.
    NEED_CHECK is set first and cleared last.  Entries that point past the end of the file are
    cleared, or made harmless, before the file grows (`qedfuse.check.outoffile`).  Copies are
    durable before the entries that point to them.  If a crash comes after the file has grown, the
    next repair does not report the data that the end of the file had cut short.  If a table lies
    over such data, a crash can also cost up to 7 bytes of it (`ShortTables.restore_data`).

    If no table has an error, only the header can change: NEED_CHECK is cleared, and the free list
    is dropped.  If the
    tables still have an error after the repair, NEED_CHECK stays set.  For a backup, the caller
    must first call `plan_repair` with ``save``.

    Args:
        file: The image.
        header: The header of the image.

    Raises:
        HostError: The host refused an access, or the file would become too long.  If a table was
            changed, NEED_CHECK is still set; only a failure of the last step may leave it clear.
        NeedsCheckError: The file is too large, or has too many tables or invalid L1 entries, to be
            checked in bounded memory.  The check before the repair refuses nearly every such image,
            and then nothing has been changed.  After a later refusal NEED_CHECK stays set.
    """
    without_need_check = header.with_need_check(value=False)
    rewriter = Rewriter(file, header)
    # An image that is too large to be checked must be refused before the first write.
    report = await check_image(file, without_need_check)
    if not report.table_errors:
        if report.errors or header.need_check:
            await rewriter.write_need_check(need_check=False)
            report = await check_image(file, without_need_check.with_free_list(value=False))
        return RepairReport((), 0, 0, report)
    repair = TableRepair(file, header, rewriter)
    await repair.run()
    after = await check_image(file, without_need_check.with_free_list(value=False))
    if not after.errors:
        await rewriter.write_need_check(need_check=False)
    lost = repair.lost_ranges
    return RepairReport(tuple(lost.ranges), repair.copied, lost.cleared_entries, after)


async def plan_repair(file: HostFile, header: Header, save: Save | None = None) -> RepairPlan:
    """Determine what `repair_image` would do to an image with table errors; change nothing.

    Args:
        file: The image.
        header: The header of the image.
        save: Called for each range that would be changed, with its file offset, its present bytes
            and its new bytes.  None for no backup.  A range past the present end of the file is
            not passed.

    Raises:
        HostError: The host cannot read the file, or the repaired file would be too long.
        NeedsCheckError: As in `repair_image`.
    """
    rewriter = DryRunRewriter(file, header, save)
    repair = TableRepair(file, header, rewriter)
    await repair.run()
    lost, cleared = tuple(repair.lost_ranges.ranges), repair.lost_ranges.cleared_entries
    return RepairPlan(lost, repair.copied, cleared, rewriter.written, rewriter.end)
