"""Undoing a repair: every byte that the repair changed is restored from the backup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.check.outoffile import POISON_ENTRY
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES
from qedfuse.ondisk.header import build_header, parse_header
from qedfuse.tools.repair.backupreader import BackupReader

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.repair.backupreader import SavedRange

_POISON_BYTES: Final = POISON_ENTRY.to_bytes(ENTRY_BYTES, "little")
"""A value that an interrupted repair can leave in L1 entries of an overlay."""


async def undo_repair(file: HostFile, backup_path: str) -> int:
    """Restore all bytes that a repair changed, and the length of the image.

    Before anything is written, the saved ranges and the length of the image are compared with the
    backup.  A change of other bytes, such as data that a guest has written, is not detected.  After
    a crash the undo can be run again.

    Args:
        file: The image, open for writing and locked.
        backup_path: The backup that the repair made.

    Returns:
        The number of ranges that were restored.

    Raises:
        CorruptImageError: The image has changed since the repair.  Nothing was written.
        UsageError: The file is not a backup, or is damaged or incomplete.  Nothing was written.
        ImageError: The backup is not a regular file; or the header of the image or of the backup,
            or a length that the backup states, is invalid.  Nothing was written.
        HostError: A system call failed.  The undo can be run again.
    """
    backup = BackupReader(backup_path)
    try:
        return await _restore(file, backup)
    finally:
        backup.close()


async def _restore(file: HostFile, backup: BackupReader) -> int:
    """Verify all saved ranges, then restore them; return the number of ranges.

    After a crash the undo can be run again.  At no moment does a read return the data of another
    cluster.
    """
    bytes_before, bytes_after = backup.bytes_before, backup.bytes_after
    for saved in backup.ranges():
        await _verify(file, saved, backup.name)
    header = parse_header(bytes(await file.pread(0, HEADER_BYTES)), file.name)
    # A repair begins only if the whole L1 table lies in the file.
    header.check_fits(bytes_before, backup.name)
    if not bytes_before <= file.size() <= bytes_after:
        expected = f"{bytes_before} to {bytes_after} bytes"
        raise CorruptImageError(_changed_message(file, "file size", f"{file.size()}", expected))
    # An interrupted repair leaves a length in between, and NEED_CHECK set.
    if not header.need_check and file.size() not in (bytes_before, bytes_after):
        expected = f"{bytes_before} or {bytes_after} bytes"
        raise CorruptImageError(_changed_message(file, "file size", f"{file.size()}", expected))
    # NEED_CHECK is set first, so that after a crash every program checks the image.
    await file.pwrite(0, build_header(header.with_need_check(value=True)))
    await file.datasync()
    # Truncate the file before restoring the entries.  The truncation removes the copies of clusters
    # that the repair has appended.  If the entries were restored first, an old entry that pointed
    # past the end of the file would now point to a copy, and return the data of another cluster.
    # In this order, a read through an entry that points to a copy fails until the entry is
    # restored.
    await file.truncate(bytes_before)
    await file.datasync()
    old_header = b""
    for offset, old, _new in backup.ranges():
        if offset:
            await file.pwrite(offset, old)
        else:
            old_header = old
    await file.datasync()
    # Last, so that NEED_CHECK stays set until everything else is durable.
    await file.pwrite(0, old_header)
    await file.datasync()
    return backup.count


async def _verify(file: HostFile, saved: SavedRange, backup_name: str) -> None:
    """Refuse a range if an entry in it has neither its old nor its new value, nor `_POISON_BYTES`.

    The bytes that describe a free list are no entries, but are compared in pieces as long as an
    entry.  The header (offset 0) must have all its old or all its new fields, with NEED_CHECK or
    without: a repair and an undo leave no other header, however they are interrupted.
    """
    offset, old, new = saved
    found = bytes(await file.pread(offset, len(old)))
    if not offset:
        known = [_without_need_check(raw, backup_name) for raw in (old, new)]
        if _without_need_check(found, file.name) not in known:
            found_fields, expected = "other values than in the backup", "the same values"
            raise CorruptImageError(_changed_message(file, "header", found_fields, expected))
    elif found not in (old, new):
        for at in range(0, len(old), ENTRY_BYTES):
            entry = slice(at, at + ENTRY_BYTES)
            if found[entry] not in (old[entry], new[entry], _POISON_BYTES[: len(old[entry])]):
                seen, expected = found[entry].hex(), f"{old[entry].hex()} or {new[entry].hex()}"
                raise CorruptImageError(
                    _changed_message(file, f"byte {offset + at}", seen, expected)
                )


def _without_need_check(raw: bytes, name: str) -> Header:
    """Parse a header; return it with NEED_CHECK cleared."""
    return parse_header(raw, name).with_need_check(value=False)


def _changed_message(file: HostFile, what: str, found: str, expected: str) -> str:
    """Return the message that the image has changed since the repair."""
    return (
        f"{file.name}: nothing was restored: {what}: found {found}, expected {expected}; "
        "the image has changed since the repair"
    )
