"""Checking an image, repairing its tables, and reclaiming its leaked clusters."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.check.checker import check_image
from qedfuse.check.findings import RepairPlan
from qedfuse.check.repair import plan_repair, repair_image
from qedfuse.disk.disk import Disk
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError, HostError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.remote.address import require_local
from qedfuse.remote.options import RemoteOptions
from qedfuse.tools.repair.backup import Backup, BackupSize
from qedfuse.tools.repair.checkresult import CheckResult, KeepReason
from qedfuse.tools.repair.refusals import (
    implausible_message,
    is_risky,
    max_unforced_bytes,
    refuse_excess,
    refuse_without_space,
)
from qedfuse.tools.repair.undo import undo_repair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Literal

    from qedfuse.check.findings import CheckReport
    from qedfuse.ondisk.header import Header
    from qedfuse.util.backgroundtasks import Progress


async def check(
    path: str,
    *,
    share: bool = False,
    remote: RemoteOptions | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Check an image and change nothing; the backing file is not opened.

    Args:
        path: The image, or its URL.
        share: Allow that another program writes to the image.
        remote: How to read a URL; None for the defaults.
        progress: Called with the number of tables read so far and in all.

    Raises:
        NeedsCheckError: The image is too large, or has too many tables, to be checked.
        QedError: The image cannot be opened, locked or read.
    """
    lock = LockMode.to_read(share=share)
    async with open_image(path, lock, remote or RemoteOptions()) as file:
        header = await read_header(file)
        report = await check_image(file, header, progress)
        return CheckResult.of_check(header, file.size(), report)


async def plan(
    path: str,
    level: Literal["leaks", "all"],
    *,
    share: bool = False,
    progress: Progress | None = None,
) -> CheckResult:
    """Check an image and return what `repair` would do, without changing anything.

    Args:
        path: The image.
        level: ``leaks`` or ``all``, see `repair`.
        share: Allow that another program writes to the image.
        progress: Called with the number of tables read so far and in all.

    Raises:
        UsageError: The image is a URL.
        NeedsCheckError: The image is too large, or has too many tables, to be checked.
        QedError: The image cannot be opened, locked or read.
    """
    async with _open_image(path, LockMode.to_read(share=share)) as (file, header):
        report = await check_image(file, header, progress)
        repair_plan = RepairPlan()
        if report.errors and level == "all":
            repair_plan = await plan_repair(file, header)
        # Leaks can be kept even if the image has none now.  The repair of errors can leak clusters:
        # those in the free list, which it drops, and the old clusters of a table that it moves.
        keep_reason = _keep_reason(file, level, report)
        risky = repair_plan.written > max_unforced_bytes(file) or is_risky(report, level)
        return CheckResult.of_check(
            header,
            file.size(),
            report,
            plan=repair_plan,
            dry=True,
            needs_force=risky,
            keep_reason=keep_reason if report.errors or report.leaks else None,
        )


async def repair(
    path: str,
    level: Literal["leaks", "all"],
    *,
    force: bool = False,
    progress: Progress | None = None,
    on_plan: Callable[[CheckResult], None] | None = None,
) -> CheckResult:
    """Check an image, and then repair its tables or reclaim its leaked clusters.

    Leaked clusters are reclaimed only if the image has no errors, because an invalid entry may have
    been meant to point to one of these clusters.  Errors of the free list are errors, too.  To
    reclaim leaked clusters, the highest clusters in use are moved into the space of the leaked
    ones, and the file is truncated.

    After a repair the clusters of cleared entries are leaked, and hold all that is left of the lost
    data.  So a call with ``all`` that repairs errors keeps all leaked clusters.  Later calls with
    ``all`` keep them as long as the first backup exists (``.before-repair`` without a number) or
    the image has another hard link.  A call with ``leaks`` reclaims them.

    Args:
        path: The image; no other program may have the image open.
        level: ``all`` repairs the image if it has errors, and otherwise reclaims leaked clusters.
            ``leaks`` only reclaims leaked clusters, and changes nothing if the image has errors.
        force: Repair even if the repair writes more than `max_unforced_bytes`, or if the tables
            seem to lie at another offset than the header says.
        progress: Called with the work done in the present step, and all work of that step: tables
            while the image is checked, bytes while clusters are moved.
        on_plan: Called before the first change by a repair of errors, when the backup is complete,
            with the planned result: its ``after`` is the report before the repair.  If the repair
            is interrupted, the next repair no longer finds the ranges that this one has lost.

    Raises:
        UsageError: The image is a URL.
        CorruptImageError: The repair is refused without ``force``.  Nothing has been changed.
        NeedsCheckError: The image is too large, or has too many tables, to be checked.  Or the
            repair has made the image too large, or has found too many invalid L1 entries.
        NoSpaceError: The host has too little space for the repair.  Nothing has been changed,
            unless the host became full during the repair.
        QedError: The image cannot be opened or locked, or a system call failed.  The image is not
            damaged further, and the repair can be run again.
    """
    async with _open_image(path, LockMode.WRITE) as (file, header):
        size = file.size()
        before = after = await check_image(file, header, progress)
        if is_risky(before, level) and not force:
            raise CorruptImageError(implausible_message(file, before))
        repair_plan, backup_path = RepairPlan(), None
        keep_reason = _keep_reason(file, level, before)
        if before.errors and level == "all":
            # The repair is planned twice, because the backup of a hostile image can be many times
            # as long as the image.  So a refusal must come before the backup is written.
            backup_size = BackupSize()
            repair_plan = await plan_repair(file, header, backup_size.save)
            refuse_excess(file, repair_plan, force=force)
            refuse_without_space(file, repair_plan, backup_size.bytes)
            with Backup(_backup_path(path), file.stat()) as backup:
                await plan_repair(file, header, backup.save)
                backup.finish(size, repair_plan.end)
            # The image is changed only from here on, when the backup is complete and durable.
            backup_path = backup.path
            if on_plan is not None:
                planned = {"plan": repair_plan, "backup": backup_path}
                on_plan(CheckResult.of_check(header, size, before, **planned))
            after = (await repair_image(file, header)).after
        elif keep_reason and header.need_check:
            # Leaks are kept because of an earlier repair.  NEED_CHECK is set, because
            # that repair was interrupted after it had written all entries, or because a later mount
            # was.  As there are no errors, `repair_image` only clears NEED_CHECK and drops the
            # persistent free list.
            after = (await repair_image(file, header)).after
        if not keep_reason and not after.errors and (after.leaks or header.need_check):
            await _reclaim(file, path, progress)
            after = await check_image(file, await read_header(file), progress)
        return CheckResult(
            before,
            after,
            header.geometry.clusters(header.image_size),
            size,
            file.size(),
            repair_plan,
            backup_path,
            keep_reason=keep_reason if after.leaks else None,
        )


async def undo(path: str, backup: str, *, progress: Progress | None = None) -> CheckResult:
    """Undo a repair, and check the image again.

    Args:
        path: The image; no other program may have the image open.
        backup: Path of the backup that the repair made.
        progress: Called with the number of tables read so far and in all.

    Raises:
        CorruptImageError: The image has changed since the repair.  Nothing was restored.
        UsageError: The image is a URL, or ``backup`` is not a backup, or is damaged or incomplete.
            Nothing was restored.
        NeedsCheckError: The image is restored, but is too large, or has too many tables, to be
            checked.
        QedError: The image or the backup cannot be opened, or a system call failed.  The undo
            can be run again.
    """
    async with _open_image(path, LockMode.WRITE) as (file, _header):
        bytes_before = file.size()
        count = await undo_repair(file, backup)
        header = await read_header(file)
        result = CheckResult.of_check(
            header, file.size(), await check_image(file, header, progress), undone=count
        )
        return replace(result, bytes_before=bytes_before)


def _backup_path(path: str) -> str:
    """Return the path of the first backup of an image; later backups have a number appended.

    If the path is a symbolic link, the backup lies beside the file to which it leads, so that a
    repair by any other path finds the backup.
    """
    target = os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114  a name
    return f"{target}.before-repair"


def _keep_reason(
    file: PosixFile, level: Literal["leaks", "all"], report: CheckReport
) -> KeepReason | None:
    """Return why leaked clusters must be kept; None if they may be freed.

    They may hold data that a repair loses: the present one, or an earlier one, which has left its
    backup.  If the image has other hard links, the backup can lie beside any of them.
    """
    if level != "all":
        return None
    if report.errors or os.path.lexists(_backup_path(file.path)):
        return KeepReason.REPAIR
    return KeepReason.HARD_LINKS if file.stat().st_nlink > 1 else None


async def _reclaim(file: PosixFile, path: str, progress: Progress | None) -> None:
    """Reclaim the leaked clusters of an image without errors, and clear NEED_CHECK.

    ``file`` must be open for writing and locked; it stays open.
    """
    header = await read_header(file)
    # The close need not compact, because `Disk.compact` is called below.
    options = OpenOptions(writable=True, compact="off")
    # The disk gets a duplicate of the descriptor, because it closes its descriptor at the end.  The
    # lock belongs to the open file description, so it stays until ``file`` is closed.
    try:
        fd = os.dup(file.fd)
    except OSError as error:
        raise HostError.from_os(error, file.name, "cannot open again") from error
    duplicate = PosixFile(fd, path, writable=True)
    disk = Disk(duplicate, header, [], options, make_store(options.cache_bytes), path)
    async with disk.serving():
        await disk.compact(progress, within_bound=False)


@asynccontextmanager
async def _open_image(path: str, mode: LockMode) -> AsyncIterator[tuple[PosixFile, Header]]:
    """Open and lock an image without its backing file; yield the file and its header."""
    require_local(path)
    with open_image_file(path, mode, writable=mode is LockMode.WRITE) as file:
        yield file, await read_header(file)
