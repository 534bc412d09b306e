"""Reading the backup of a repair, after all of it has been examined."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from qedfuse.errors import HostError, UsageError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES, MAX_OFFSET
from qedfuse.text import printable
from qedfuse.tools.repair.backup import FIRST_LINE, LAST_LINE_KEYWORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    SavedRange = tuple[int, bytes, bytes]  # file offset, old bytes, new bytes

_MAX_LINE_BYTES: Final = 16 << 20
"""Maximum length of a line.  A repair writes lines of at most about 256 KiB, for a slice."""


class BackupReader:
    """Reads a file that `qedfuse.tools.repair.backup.Backup` has written, range by range.

    Attributes:
        name: The name of the backup in messages.
        count: Number of ranges.
        bytes_before: Length of the image before the repair.
        bytes_after: Length of the image after the repair.
    """

    def __init__(self, path: str) -> None:
        """Open a backup and examine all of it; the caller must call `close`.

        The first range must be the header.  The others must lie after the header, not overlap, and
        consist of whole entries.  Only the range at the end of the old image may end within an
        entry.

        Raises:
            UsageError: The file is not a backup, or is damaged or not complete.
            ImageError: The file is not a regular file.
            HostError: The host cannot open or read the file.
        """
        self.name = printable(path)
        self.count = self.bytes_before = self.bytes_after = 0
        self._file = os.fdopen(open_regular(path, os.O_RDONLY), "rb")
        try:
            self._examine()
        except BaseException:
            self.close()
            raise

    def ranges(self) -> Iterator[SavedRange]:
        """Yield the saved ranges, the header first; each call begins with the first range.

        Raises:
            UsageError: The file has changed since the object was made.
            HostError: The host cannot read the file.
        """
        try:
            yield from self._parse()
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _examine(self) -> None:
        """Set `count` and the lengths, or refuse the file; see `__init__`."""
        starts, ends = array("q"), array("q")
        for offset, old, _new in self.ranges():
            starts.append(offset)
            ends.append(offset + len(old))
        if not starts:
            self._refuse("no range", "the header as the first range")
        if not max(ends) <= self.bytes_before <= self.bytes_after:
            self._refuse(
                f"lengths of {self.bytes_before} and {self.bytes_after} bytes",
                f"ascending ones of at least {max(ends)} bytes, the end of the last range",
            )
        offsets, limits = np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64)
        partial = (limits - offsets) % ENTRY_BYTES != 0
        if partial.any() and limits[partial].min() < self.bytes_before:
            at = int(offsets[partial][limits[partial].argmin()])
            self._refuse(f"a range at {at} that ends within an entry", "whole entries")
        order = np.argsort(offsets, kind="stable")
        overlaps = np.flatnonzero(offsets[order][1:] < limits[order][:-1])
        if len(overlaps):
            first, second = (int(offsets[order][overlaps[0] + step]) for step in (0, 1))
            self._refuse(f"overlapping ranges at {first} and {second}", "separate ones")

    def _parse(self) -> Iterator[SavedRange]:
        """Yield the saved ranges, and set `count` and the lengths at the end; see `ranges`."""
        self._file.seek(0)
        if self._file.readline(len(FIRST_LINE) + 1) != FIRST_LINE + b"\n":
            msg = f"{self.name}: found another kind of file, expected the backup of a repair"
            raise UsageError(msg)
        count = 0
        while line := self._file.readline(_MAX_LINE_BYTES):
            words = line.split()
            try:
                if words[0] == LAST_LINE_KEYWORD:
                    number, before, after = map(_parse_decimal, words[1:])
                    if number != count or not line.endswith(b"\n") or self._file.read(1):
                        break
                    self.count, self.bytes_before, self.bytes_after = number, before, after
                    return
                offset = _parse_decimal(words[0])
                old, new = (bytes.fromhex(word.decode("ascii")) for word in words[1:])
            except (ValueError, IndexError):
                break
            if len(old) != len(new) or not old:
                break
            self._check_range(count, offset, len(old))
            yield offset, old, new
            count += 1
        self._refuse("an incomplete or damaged backup", "a complete one")

    def _check_range(self, number: int, offset: int, length: int) -> None:
        """Refuse the range with the index ``number`` if a repair does not save such a range."""
        if not number:
            if (offset, length) != (0, HEADER_BYTES):
                found = f"a first range of {length} bytes at {offset}"
                self._refuse(found, f"the {HEADER_BYTES} bytes of the header at 0")
        elif offset < HEADER_BYTES or offset % ENTRY_BYTES or offset + length > MAX_OFFSET:
            self._refuse(
                f"a range of {length} bytes at {offset}",
                f"one after the header, at a multiple of {ENTRY_BYTES}",
            )

    def _refuse(self, found: str, expected: str) -> NoReturn:
        """Raise `UsageError` for this backup."""
        msg = f"{self.name}: found {found}, expected {expected}"
        raise UsageError(msg)


def _parse_decimal(word: bytes) -> int:
    """Return the number in a word; raise ValueError if it is invalid or above `MAX_OFFSET`."""
    if not word.isdigit() or len(word) > len(str(MAX_OFFSET)) or int(word) > MAX_OFFSET:
        raise ValueError
    return int(word)
