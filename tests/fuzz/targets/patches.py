"""Sparse files as short inputs: the length of the file, and the words that are not zero.

So most mutations of an input change a field or a table entry, and few change data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.fuzz.targets.drawn import Drawn

WORD_BYTES: Final = 8
_SECTOR_BYTES: Final = 512
MAX_FILE_SECTORS: Final = 320
_MAX_WORDS: Final = 255


def encode(content: bytes | bytearray) -> bytes:
    """Return the input for a file whose length is a multiple of 512 bytes.

    The form is a length in sectors (two bytes), and runs of words: the index of the first word (two
    bytes), the number of words (one byte), the words.
    """
    out = bytearray((len(content) // _SECTOR_BYTES).to_bytes(2, "little"))
    at, end = 0, len(content) // WORD_BYTES
    while at < end:
        words = 0
        while words < _MAX_WORDS and any(_word(content, at + words)):
            words += 1
        if words:
            out += at.to_bytes(2, "little") + bytes((words,))
            out += content[at * WORD_BYTES : (at + words) * WORD_BYTES]
        at += max(words, 1)
    return bytes(out)


def decode(drawn: Drawn) -> bytearray:
    """Return the file for the rest of an input; its length is at most 160 KiB."""
    content = bytearray(drawn.number(2) % (MAX_FILE_SECTORS + 1) * _SECTOR_BYTES)
    while drawn:
        at = drawn.number(2) * WORD_BYTES
        part = drawn.take(drawn.number() * WORD_BYTES)[: max(0, len(content) - at)]
        content[at : at + len(part)] = part
    return content


def _word(content: bytes | bytearray, index: int) -> bytes | bytearray:
    return content[index * WORD_BYTES : (index + 1) * WORD_BYTES]
