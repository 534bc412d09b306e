"""Checking the image at a path, mending it, and giving back the space that it leaks."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.check.checker import check_image
from qedfuse.check.findings import RepairPlan
from qedfuse.check.repair import plan_repair, repair_image
from qedfuse.disk.disk import Disk
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError, NoSpaceError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.repair.backup import Backup
from qedfuse.tools.repair.checkresult import CheckResult
from qedfuse.tools.repair.undo import undo_repair
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Literal

    from qedfuse.check.findings import CheckReport
    from qedfuse.ondisk.header import Header

    Progress = Callable[[int, int], None]

_MAX_UNFORCED_BYTES: Final = 64 << 20
"""Bytes that a repair writes without being forced to, however small the file is."""

_SECTOR: Final = 512  # the unit of st_blocks, on every file system


async def check(path: str, *, share: bool = False, progress: Progress | None = None) -> CheckResult:
    """Check an image and change nothing; its base is not looked at.

    Args:
        path: The image.
        share: Read beside a program that writes to it.
        progress: Called with the number of tables read so far and in all.

    Raises:
        QedError: The image cannot be opened, locked or read.
    """
    async with _opened(path, LockMode.to_read(share=share)) as (file, header):
        report = await check_image(file, header, progress)
        return CheckResult.of_check(header, file.size(), report)


async def plan(
    path: str,
    level: Literal["leaks", "all"],
    *,
    share: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Find out what `repair` would do, and change nothing.

    Raises:
        QedError: As `check`.
    """
    async with _opened(path, LockMode.to_read(share=share)) as (file, header):
        report = await check_image(file, header, progress)
        wanted = RepairPlan()
        if report.table_errors and level == "all":
            wanted = await plan_repair(file, header)
        risky = wanted.written > _allowed(file) or _is_risky(report, level)
        return CheckResult.of_check(
            header,
            file.size(),
            report,
            plan=wanted,
            dry=True,
            needs_force=risky,
            leaks_kept=_keeps_leaks(path, level, report),
        )


async def repair(
    path: str,
    level: Literal["leaks", "all"],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Mend the tables of an image (``all``), or give back what it leaks.

    Leaked space is only given back while no table is bad: a bad entry may be meant for
    it.  Nor does the run that mends give any back, or another with ``all`` as long as the
    backup is there: what the entries named that were cleared is leaked then, and is all
    that is left of the data.  Where space is given back, clusters move into the holes, so
    that the file has none, and gets shorter.

    Args:
        path: The image; nobody else may have it open.
        level: What to mend.
        force: Repair also where that writes far more than the file has, and where the
            tables seem not to be the image's.
        progress: Called with how much of the present step is done, and of how much.

    Raises:
        CorruptImageError: It would have to be forced.  Nothing has been changed.
        QedError: The image cannot be opened or locked, or the host refused.  The image
            is no worse than before.
    """
    async with _opened(path, LockMode.WRITE) as (file, header):
        size = file.size()
        before = after = await check_image(file, header, progress)
        if _is_risky(before, level) and not force:
            raise CorruptImageError(_doubt(file, before))
        done, saved = RepairPlan(), None
        keeps = _keeps_leaks(path, level, before)
        if before.errors and level == "all":
            with Backup(_backup_of(path), file.stat()) as backup:
                done = await plan_repair(file, header, backup.save)
                _refuse_excess(file, done, force=force)
                _refuse_without_room(file, done)
                backup.finish(size, done.end)
            # All of it is durable: only now the image may change.
            saved = backup.path
            after = (await repair_image(file, header)).after
        elif keeps and header.need_check:
            # An interrupted repair that had no entry left to change.
            after = (await repair_image(file, header)).after
        if not keeps and not after.errors and (after.leaks or header.need_check):
            await _reclaim(file, path, progress)
            after = await check_image(file, await read_header(file), progress)
        return CheckResult(
            before,
            after,
            header.geometry.clusters(header.image_size),
            size,
            file.size(),
            done,
            saved,
            leaks_kept=keeps and after.leaks > 0,
        )


async def undo(path: str, saved: str, *, progress: Progress | None = None) -> CheckResult:
    """Put back what a repair has changed, and check the image again.

    Args:
        path: The image; nobody else may have it open.
        saved: The backup that the repair made.
        progress: Called with the number of tables read so far and in all.

    Raises:
        CorruptImageError: Something else has changed the image since.  It is as it was.
        QedError: The image or the backup cannot be used, or the host refused.
    """
    async with _opened(path, LockMode.WRITE) as (file, _header):
        size = file.size()
        count = await undo_repair(file, saved)
        header = await read_header(file)
        result = CheckResult.of_check(
            header, file.size(), await check_image(file, header, progress), undone=count
        )
        return replace(result, bytes_before=size)


def _backup_of(path: str) -> str:
    """Give the name of the first backup of an image."""
    return f"{path}.before-repair"


def _keeps_leaks(path: str, level: Literal["leaks", "all"], report: CheckReport) -> bool:
    """Tell whether leaks may be what a repair has cut off, this one or an interrupted one."""
    there = os.path.lexists(_backup_of(path))
    return level == "all" and (report.errors > 0 or there)


def _is_risky(report: CheckReport, level: Literal["leaks", "all"]) -> bool:
    """Tell whether something would be changed that seems not to be a table, or not leaked."""
    return report.is_implausible and (level == "all" or not report.errors)


def _doubt(file: PosixFile, report: CheckReport) -> str:
    """Say why a repair is not done without being forced."""
    return (
        f"{file.name}: not repaired: found {report.leaks} clusters leaked and "
        f"{report.allocated_clusters} in use, expected more in use: what is damaged may be the "
        "header, and the tables elsewhere (--force repairs all the same)"
    )


def _refuse_excess(file: PosixFile, wanted: RepairPlan, *, force: bool) -> None:
    """Refuse a repair by which a small file would fill the host.

    A few bytes of a hostile image can ask for thousands of tables, or copies of clusters.
    """
    allowed = _allowed(file)
    if wanted.written > allowed and not force:
        msg = (
            f"{file.name}: not repaired: found damage that takes {format_size(wanted.written)} to "
            f"repair, expected at most {format_size(allowed)} for a file of its size (--force "
            "does it all the same)"
        )
        raise CorruptImageError(msg)


def _refuse_without_room(file: PosixFile, wanted: RepairPlan) -> None:
    """Refuse a repair that would fill the host, and leave it full when it fails.

    Raises:
        NoSpaceError: There is not enough room for the copies.
    """
    host = os.fstatvfs(file.fd)
    room = host.f_bavail * host.f_frsize
    needed = min(wanted.written, max(0, wanted.end - file.size()))
    if needed > room:
        msg = (
            f"{file.name}: not repaired: found {format_size(room)} free on the host, expected "
            f"{format_size(needed)} for copies of what has several owners"
        )
        raise NoSpaceError(msg)


def _allowed(file: PosixFile) -> int:
    """Tell how much a repair may write without being forced to, in bytes."""
    return max(_MAX_UNFORCED_BYTES, file.stat().st_blocks * _SECTOR)


async def _reclaim(file: PosixFile, path: str, progress: Progress | None) -> None:
    """Give back what a sound image leaks, and clear NEED_CHECK; the base is not needed."""
    header = await read_header(file)
    options = OpenOptions(writable=True, compact="off")
    # The disk closes its descriptor; the lock stays as long as ours is there.
    own = PosixFile(os.dup(file.fd), path, writable=True)
    disk = Disk(own, header, [], options, make_store(options.cache_bytes), path)
    async with disk.serving():
        await disk.compact(progress, within_bound=False)


@asynccontextmanager
async def _opened(path: str, mode: LockMode) -> AsyncIterator[tuple[PosixFile, Header]]:
    """Open and lock an image, and nothing that it refers to."""
    with open_image_file(path, mode, writable=mode is LockMode.WRITE) as file:
        yield file, await read_header(file)
