"""Repair: make the tables of an image consistent, and keep as much of the guest's data as possible.

What is done for each kind of damage, and why:

- A cluster with several owners stays with the first one.  Each other owner gets a copy, so
  that every guest offset reads as before.
- Two L1 entries that name the same table, or tables that overlap, are treated alike: the
  second gets a copy of the table.  Its clusters then have two owners, so they are copied.
- A cluster that is both part of a table and data: the table moves to a copy, the data stays.
  One of the two owners is wrong, and the tables do not show which.  If the L1 entry of the
  table is the invalid one, clearing the entry of the data would lose guest data, and so would
  correcting the table in place.  The range is reported, since the other owner may be wrong.
- A table that the end of the file cuts short keeps the entries that are in the file.  A data
  cluster that is cut short is completed with zeros.
- An entry that points outside the file, is unaligned, or points to the header or the L1
  table refers to no data of the guest: it is cleared.
- Where an entry is lost, an overlay gets a zero cluster, and for a lost L1 entry a table of
  zero clusters.  Otherwise old data of the backing file would appear as if it were valid.
- What lies past the end of the disk is never copied, and cleared where it conflicts.
  Otherwise the image of a small disk could be made to fill the host's file system.

Ranges of the disk whose data is lost are reported.  Leaked clusters are left alone.  The
persistent free list is dropped as soon as anything is changed, or if it is invalid itself.
Its clusters then count as leaked, until a writable open scans the tables.
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
        lost: Ranges whose data is lost, in the order in which they were found.
        copied: Number of clusters that were copied.
        cleared: Number of entries that were cleared.
        after: The check of the repaired image.
    """

    lost: tuple[LostRange, ...]
    copied: int
    cleared: int
    after: CheckReport


async def repair_image(file: HostFile, header: Header) -> RepairReport:
    """Repair the tables of an image that is open for writing and locked.

    The order survives a crash: NEED_CHECK is set first and cleared last, entries that point
    past the end of the file are cleared before the file grows (`qedfuse.check.outoffile`),
    and copies are durable before the entries that point to them.  An interrupted repair can
    be run again; it then no longer knows what the end of the file had cut short.

    If the tables have no errors, only NEED_CHECK is cleared and an invalid free list is
    dropped.  Nothing is backed up: `plan_repair` does that, before anything is changed.

    Args:
        file: The image.
        header: Its header.

    Raises:
        HostError: The host refused; NEED_CHECK stays set.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    sound = header.with_need_check(value=False)
    rewriter = Rewriter(file, header)
    # An image that cannot be checked is refused before anything is changed.
    before = await check_image(file, sound)
    if not before.table_errors:
        if before.errors or header.need_check:
            await rewriter.write_need_check(need_check=False)
            before = await check_image(file, sound.with_free_list(value=False))
        return RepairReport((), 0, 0, before)
    repair = TableRepair(file, header, rewriter)
    await repair.run()
    after = await check_image(file, sound.with_free_list(value=False))
    if not after.errors:
        await rewriter.write_need_check(need_check=False)
    return RepairReport(
        tuple(repair.lost_ranges.ranges), repair.copied, repair.lost_ranges.cleared, after
    )


async def plan_repair(file: HostFile, header: Header, save: Save | None = None) -> RepairPlan:
    """Determine what `repair_image` would do to an image with errors; change nothing.

    Args:
        file: The image.
        header: Its header.
        save: Called for each range of bytes that would be changed, with its file offset, its
            present bytes, and its new bytes; not for bytes past the end of the file.

    Raises:
        HostError: The host cannot read the file, or could not hold the repaired one.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    rewriter = DryRunRewriter(file, header, save)
    repair = TableRepair(file, header, rewriter)
    await repair.run()
    lost, cleared = tuple(repair.lost_ranges.ranges), repair.lost_ranges.cleared
    return RepairPlan(lost, repair.copied, cleared, rewriter.written, rewriter.end)
