"""Taking back a repair: every byte that it changed becomes again what its backup says."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES
from qedfuse.ondisk.header import build_header, parse_header
from qedfuse.text import printable
from qedfuse.tools.repair.backup import FIRST, LAST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

    Piece = tuple[int, bytes, bytes]

MARKED: Final = (1).to_bytes(ENTRY_BYTES, "little")
"""What an entry of an overlay may be while a repair is under way, and afterwards."""


async def undo_repair(file: HostFile, saved: str) -> int:
    """Put back what a repair changed, and give the image the length that it had.

    Only right as long as nothing else has changed the image: whatever can be seen of that
    is refused, before anything is written.  Crash-safe: it can be run again.

    Args:
        file: The image, open for writing and locked.
        saved: The backup that the repair made.

    Returns:
        The number of pieces that were put back.

    Raises:
        CorruptImageError: The image is not as the repair has left it.
        UsageError: The backup is none, or is not complete.
        HostError: The host refused.
    """
    backup = _Backup(saved)
    try:
        return await _put_back(file, backup)
    finally:
        backup.close()


async def _put_back(file: HostFile, backup: _Backup) -> int:
    """Verify everything, and then put it back in an order that a crash cannot spoil."""
    count = 0
    for piece in backup.pieces():
        await _verify(file, piece)
        count += 1
    before, after = backup.lengths
    if not before <= file.size() <= after:
        expected = f"{before} to {after} bytes"
        raise CorruptImageError(_changed(file, "file size", f"{file.size()}", expected))
    # NEED_CHECK says of whatever a crash leaves that it must not be trusted.
    header = parse_header(bytes(await file.pread(0, HEADER_BYTES)), file.name)
    await file.pwrite(0, build_header(header.with_need_check(value=True)))
    await file.datasync()
    # The copies go before the entries come back: an entry that pointed past the end of the
    # file would else point to one of them.  What points to a copy until it is put back
    # points past the end for so long, which is an error and shows nobody's data.
    await file.truncate(before)
    await file.datasync()
    original = b""
    for offset, old, _new in backup.pieces():
        if offset:
            await file.pwrite(offset, old)
        else:
            original = old
    await file.datasync()
    await file.pwrite(0, original)
    await file.datasync()
    return count


async def _verify(file: HostFile, piece: Piece) -> None:
    """Refuse a piece that is neither as it was nor as the repair made it, entry by entry."""
    offset, old, new = piece
    found = bytes(await file.pread(offset, len(old)))
    if not offset:
        if _fixed(found, file.name) != _fixed(old, file.name):
            raise CorruptImageError(_changed(file, "header", "another", "that of the backup"))
    elif found not in (old, new):
        for at in range(0, len(old), ENTRY_BYTES):
            part = slice(at, at + ENTRY_BYTES)
            if found[part] not in (old[part], new[part], MARKED[: len(old[part])]):
                seen, expected = found[part].hex(), f"{old[part].hex()} or {new[part].hex()}"
                raise CorruptImageError(_changed(file, f"byte {offset + at}", seen, expected))


def _fixed(raw: bytes, name: str) -> Header:
    """Read a header, without what a repair changes in it."""
    return replace(parse_header(raw, name), features=0, autoclear_features=0)


def _changed(file: HostFile, what: str, found: str, expected: str) -> str:
    """Say why nothing is put back."""
    return (
        f"{file.name}: nothing is put back: {what}: found {found}, expected {expected}: "
        "it is not as the repair has left it"
    )


class _Backup:
    """A file that `qedfuse.tools.repair.backup.Backup` has made; long, and so read piece by piece.

    Attributes:
        lengths: The image's length before and after the repair, once all has been read.
    """

    def __init__(self, path: str) -> None:
        self._name = printable(path)
        self._file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
        self.lengths = (0, 0)

    def pieces(self) -> Iterator[Piece]:
        """Read the pieces: file offset, old bytes, new bytes; the header is the first.

        Raises:
            UsageError: This is no backup, or one that is not complete.
        """
        self._file.seek(0)
        if self._file.readline() != FIRST + b"\n":
            msg = f"{self._name}: found something else, expected the backup of a repair"
            raise UsageError(msg)
        for count, line in enumerate(self._file):
            words = line.split()
            try:
                if words[0] == LAST:
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
        msg = f"{self._name}: found an incomplete or damaged backup, expected a whole one"
        raise UsageError(msg)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
