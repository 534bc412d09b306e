"""Drawing inputs: an input of the corpus, changed at a few places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_MAX_STEPS_BITS: Final = 3
_EDGES: Final = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x1000, 0x7FFF, 0x8000, 0xFFFF)
_HUGE: Final = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
"""Numbers at which a field changes its meaning or overflows."""


class Mutator:
    """Draws inputs; the same generator and corpus give the same inputs."""

    def __init__(
        self, choice: random.Random, corpus: Sequence[bytes], tokens: Sequence[bytes], limit: int
    ) -> None:
        """Mutate the inputs of ``corpus``.

        Args:
            choice: The generator.
            corpus: Inputs, at least one.
            tokens: Bytes that are inserted.
            limit: Maximum length of an input.
        """
        self._choice = choice
        self._corpus = corpus
        self._tokens = tokens
        self._limit = limit
        self._changes = (
            *(self._flip, self._set, self._add, self._edge),
            *(self._token, self._cut, self._repeat, self._splice),
        )

    def draw(self) -> bytes:
        """Return an input of the corpus after one to eight changes."""
        choice = self._choice
        data = bytearray(choice.choice(self._corpus))
        for _ in range(1 << choice.randrange(_MAX_STEPS_BITS + 1)):
            choice.choice(self._changes)(data)
        return bytes(data[: self._limit])

    def _at(self, data: bytearray, width: int = 0) -> int:
        """Return an index at which ``width`` bytes begin, or 0 if there are fewer."""
        return self._choice.randrange(max(len(data) - width, 0) + 1)

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._choice.randrange(len(data))] ^= 1 << self._choice.randrange(8)

    def _set(self, data: bytearray) -> None:
        if data:
            data[self._choice.randrange(len(data))] = self._choice.randrange(256)

    def _add(self, data: bytearray) -> None:
        """Add a small number to a number."""
        width, order = self._field()
        at = self._at(data, width)
        number = int.from_bytes(data[at : at + width], order) + self._choice.randint(-16, 16)
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)

    def _edge(self, data: bytearray) -> None:
        """Replace a number by one at a limit."""
        width, order = self._field()
        at = self._at(data, width)
        number = self._choice.choice(_EDGES + _HUGE) % (1 << 8 * width)
        data[at : at + width] = number.to_bytes(width, order)

    def _field(self) -> tuple[int, Literal["little", "big"]]:
        """Return the width in bytes and the byte order of a number."""
        return self._choice.choice((1, 2, 4, 8)), "little" if self._choice.random() < 0.5 else "big"

    def _token(self, data: bytearray) -> None:
        """Insert a token, or write it over bytes."""
        if self._tokens:
            token = self._choice.choice(self._tokens)
            at = self._at(data)
            data[at : at + len(token) * self._choice.randrange(2)] = token

    def _cut(self, data: bytearray) -> None:
        at = self._at(data)
        del data[at : at + 1 + self._choice.randrange(1 << self._choice.randrange(9))]

    def _repeat(self, data: bytearray) -> None:
        """Insert a copy of a part, once or a few times."""
        at = self._at(data)
        part = data[at : at + 1 + self._choice.randrange(32)]
        where = self._at(data)
        data[where:where] = part * (1 << self._choice.randrange(4))

    def _splice(self, data: bytearray) -> None:
        """Replace a part by a part of another input."""
        other = self._choice.choice(self._corpus)
        at, start = self._at(data), self._choice.randrange(len(other) + 1)
        length = self._choice.randrange(64)
        data[at : at + length] = other[start : start + length]
