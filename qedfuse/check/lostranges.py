"""What a repair has to give up: ranges of the disk, to be told to the user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.check.findings import LostRange

if TYPE_CHECKING:
    from qedfuse.check.findings import Code

MAX_LOST_RANGES: Final = 100_000
"""Ranges that are told apart; the last one grows to cover what is lost beyond that."""


class LostRanges:
    """What is lost so far.

    Attributes:
        ranges: What had to be given up, in the order in which it was found.
        cleared: Entries that were cleared for that.
    """

    def __init__(self, image_size: int) -> None:
        """Begin with nothing lost of a disk of so many bytes."""
        self._image_size = image_size
        self.ranges: list[LostRange] = []
        self.cleared = 0

    def note(self, start: int, length: int, code: Code, cleared: int = 1) -> None:
        """Note a range of the disk that had to be given up; neighbours are joined."""
        self.cleared += cleared
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
