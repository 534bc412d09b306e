"""The ranges of the disk that a repair reports, because their data is lost or possibly wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.check.findings import LostRange

if TYPE_CHECKING:
    from qedfuse.check.findings import Code

MAX_LOST_RANGES: Final = 100_000
"""Maximum number of ranges that are recorded separately.  The last range is extended to cover all
further ones, so it can also cover data that is not lost, or is lost because of another error."""


class LostRanges:
    """The ranges of the disk whose data is lost or possibly wrong, as found so far.

    Attributes:
        ranges: The ranges, in the order in which they were found.
        cleared_entries: Number of table entries that the repair clears, as counted so far.
    """

    def __init__(self, image_size: int) -> None:
        """Begin with no lost range of a disk of ``image_size`` bytes."""
        self._image_size = image_size
        self.ranges: list[LostRange] = []
        self.cleared_entries = 0

    def add(self, start: int, length: int, code: Code, cleared_entries: int = 1) -> None:
        """Record a range of the disk whose data is lost or possibly wrong.

        The part of the range past the end of the disk is not recorded.

        Args:
            start: Guest offset in bytes.
            length: Length in bytes.
            code: The error because of which the data is lost or possibly wrong.
            cleared_entries: Number of table entries that are cleared because of this error.
        """
        self.cleared_entries += cleared_entries
        length = max(0, min(length, self._image_size - start))
        if not length:
            return
        last = self.ranges[-1] if self.ranges else None
        if last is not None and last.code is code and last.start + last.length == start:
            self.ranges[-1] = LostRange(last.start, last.length + length, code)
        elif last is not None and len(self.ranges) >= MAX_LOST_RANGES:
            begin = min(last.start, start)
            end = max(last.start + last.length, start + length)
            self.ranges[-1] = LostRange(begin, end - begin, last.code)
        else:
            self.ranges.append(LostRange(start, length, code))
