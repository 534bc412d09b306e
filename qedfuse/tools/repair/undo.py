"""Undoing a repair: every byte that the repair changed is restored from the backup."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.check.outoffile import POISON_ENTRY
from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES
from qedfuse.ondisk.header import build_header, parse_header
from qedfuse.text import printable
from qedfuse.tools.repair.backup import FIRST_LINE, LAST_WORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

    SavedRange = tuple[int, bytes, bytes]  # file offset, old bytes, new bytes

_POISON_BYTES: Final = POISON_ENTRY.to_bytes(ENTRY_BYTES, "little")
"""The value of some L1 entries of an overlay during a repair, and after an interrupted repair."""


async def undo_repair(file: HostFile, backup_path: str) -> int:
    """Restore all bytes that a repair changed, and the length of the image.

    This is correct only if nothing has changed the image since the repair.  All saved ranges
    are compared with the image before anything is written, and a difference raises.  After a
    crash the undo can be run again.

    Args:
        file: The image, open for writing and locked.
        backup_path: The backup that the repair made.

    Returns:
        The number of ranges that were restored.

    Raises:
        CorruptImageError: The image has changed since the repair.  Nothing was written.
        UsageError: The file is no backup, or is not complete.  Nothing was written.
        HostError: The host refused.
    """
    backup = _BackupReader(backup_path)
    try:
        return await _restore(file, backup)
    finally:
        backup.close()


async def _restore(file: HostFile, backup: _BackupReader) -> int:
    """Verify all saved ranges, then restore them in an order in which a crash loses nothing.

    Returns the number of ranges.
    """
    count = 0
    for saved in backup.ranges():
        await _verify(file, saved)
        count += 1
    before, after = backup.lengths
    if not before <= file.size() <= after:
        expected = f"{before} to {after} bytes"
        raise CorruptImageError(_changed(file, "file size", f"{file.size()}", expected))
    # NEED_CHECK is set first, so that after a crash every program checks the image.
    header = parse_header(bytes(await file.pread(0, HEADER_BYTES)), file.name)
    await file.pwrite(0, build_header(header.with_need_check(value=True)))
    await file.datasync()
    # The file is truncated before the entries are restored, which removes the copies that the
    # repair has appended.  If the entries were restored first, an old entry that pointed past
    # the end of the file would point to one of the copies.  In the chosen order an entry that
    # points to a copy points past the end of the file until it is restored.  A read of its
    # range then fails, instead of returning the data of another cluster.
    await file.truncate(before)
    await file.datasync()
    original = b""
    for offset, old, _new in backup.ranges():
        if offset:
            await file.pwrite(offset, old)
        else:
            original = old
    await file.datasync()
    # The old header is restored last, so NEED_CHECK stays set until everything else is durable.
    await file.pwrite(0, original)
    await file.datasync()
    return count


async def _verify(file: HostFile, saved: SavedRange) -> None:
    """Refuse a range if one of its entries is neither as before the repair nor as after it.

    The value that an interrupted repair leaves in an L1 entry is accepted as well.  Of the
    header, only the fields that a repair does not change are compared.

    Raises:
        CorruptImageError: The range differs.
    """
    offset, old, new = saved
    found = bytes(await file.pread(offset, len(old)))
    if not offset:
        if _unchanged_header(found, file.name) != _unchanged_header(old, file.name):
            found_fields, expected = "other values than in the backup", "the same values"
            raise CorruptImageError(_changed(file, "header", found_fields, expected))
    elif found not in (old, new):
        for at in range(0, len(old), ENTRY_BYTES):
            entry = slice(at, at + ENTRY_BYTES)
            if found[entry] not in (old[entry], new[entry], _POISON_BYTES[: len(old[entry])]):
                seen, expected = found[entry].hex(), f"{old[entry].hex()} or {new[entry].hex()}"
                raise CorruptImageError(_changed(file, f"byte {offset + at}", seen, expected))


def _unchanged_header(raw: bytes, name: str) -> Header:
    """Parse a header, and set the fields that a repair changes to 0."""
    return replace(parse_header(raw, name), features=0, autoclear_features=0)


def _changed(file: HostFile, what: str, found: str, expected: str) -> str:
    """Return the message that the image has changed since the repair, and where."""
    return (
        f"{file.name}: nothing was restored: {what}: found {found}, expected {expected}: "
        "the image has changed since the repair"
    )


class _BackupReader:
    """Reads a file that `qedfuse.tools.repair.backup.Backup` has written, range by range.

    Attributes:
        lengths: Length of the image before and after the repair, in bytes; (0, 0) until
            `ranges` has yielded all ranges.
    """

    def __init__(self, path: str) -> None:
        self._name = printable(path)
        self._file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
        self.lengths = (0, 0)

    def ranges(self) -> Iterator[SavedRange]:
        """Yield the saved ranges, first that of the header; may be called again.

        Raises:
            UsageError: The file is no backup, or is not complete.
        """
        self._file.seek(0)
        if self._file.readline() != FIRST_LINE + b"\n":
            msg = f"{self._name}: found another kind of file, expected the backup of a repair"
            raise UsageError(msg)
        for count, line in enumerate(self._file):
            words = line.split()
            try:
                if words[0] == LAST_WORD:
                    number, before, after = map(int, words[1:])
                    self.lengths = (before, after)
                    if number == count:
                        return
                    break
                old, new = (bytes.fromhex(word.decode("ascii")) for word in words[1:])
                offset = int(words[0])
            except (ValueError, IndexError):
                break
            if len(old) != len(new) or (offset > 0) != (count > 0):
                break
            yield offset, old, new
        msg = f"{self._name}: found an incomplete or damaged backup, expected a complete one"
        raise UsageError(msg)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
