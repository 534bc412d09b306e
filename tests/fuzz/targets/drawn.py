"""Reading numbers, bytes and choices from an input, which may end anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Drawn:
    """The rest of an input; what is missing reads as zeros."""

    def __init__(self, data: bytes) -> None:
        """Begin at the first byte of ``data``."""
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Return whether bytes are left."""
        return self._at < len(self._data)

    def number(self, width: int = 1) -> int:
        """Return a little-endian number of ``width`` bytes."""
        return int.from_bytes(self.take(width), "little")

    def take(self, length: int) -> bytes:
        """Return the next bytes; fewer than ``length`` only at the end of the input."""
        part = self._data[self._at : self._at + length]
        self._at += len(part)
        return part

    def string(self) -> bytes:
        """Return bytes after their length, a number of one byte."""
        return self.take(self.number())

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.number() % len(options)]

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))
