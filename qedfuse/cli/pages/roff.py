"""Conversion of text into roff, the language of man pages."""

from __future__ import annotations

import re
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_WRAPPER: Final = TextWrapper(width=76, break_long_words=False, break_on_hyphens=False)
_ESCAPED: Final = str.maketrans(
    {
        "\\": r"\e",
        "-": r"\-",  # prints the ASCII character; roff may print a bare "-" as a Unicode hyphen
        "'": r"\(aq",
        "`": r"\(ga",
        "^": r"\(ha",
        "~": r"\(ti",
        '"': r"\(dq",
    }
)
"""The characters that roff would change or interpret, and what prints them."""
_SENTENCE_END: Final = re.compile(r"(?<=[.:;?!])  +|(?<=[.?!]) (?=[A-Z\"])")
"""The blanks after a sentence: two or more, or one before a capital letter or a quote."""


def plain(text: str) -> str:
    """Escape text; if the result begins a line, the caller must pass it to `line`."""
    return text.translate(_ESCAPED)


def bold(text: str) -> str:
    """Escape text and set it in bold, for words that are typed literally."""
    return rf"\fB{plain(text)}\fR"


def italic(text: str) -> str:
    """Escape text and set it in italics, for placeholders."""
    return rf"\fI{plain(text)}\fR"


def argument(text: str) -> str:
    """Escape text as a single argument of a macro."""
    return f'"{plain(text)}"'


def line(text: str) -> str:
    """Return escaped text as a line that roff prints, even if it begins with a dot or a quote."""
    return rf"\&{text}" if text.startswith((".", "'")) else text


def paragraphs(text: str) -> Iterator[str]:
    """Yield prose as roff: an empty line begins a paragraph, and indented lines are an example."""
    for number, part in enumerate(text.strip("\n").split("\n\n")):
        if number:
            yield ".PP"
        if part.startswith("    "):
            yield from example(part)
        else:
            yield from sentences(part)


def sentences(text: str) -> Iterator[str]:
    """Yield a paragraph as lines of roff; each sentence ends a line, as roff requires."""
    # Lines are joined by one blank, or by two after a punctuation mark that can end a sentence.
    joined = re.sub(r"(?<![.:;?!])\s+", " ", text.strip()).replace("\n", "  ")
    for sentence in _SENTENCE_END.split(joined):
        yield from map(line, _WRAPPER.wrap(_marked(sentence)))


def example(text: str) -> Iterator[str]:
    """Yield an example as roff, in which lines are not joined."""
    yield ".RS 4"
    yield ".EX"
    for row in text.splitlines():
        yield line(plain(row.removeprefix("    ")))
    yield ".EE"
    yield ".RE"


def item(tag: str, text: str) -> Iterator[str]:
    """Yield the paragraph ``text`` with the hanging tag ``tag``; only ``text`` is escaped."""
    yield ".TP"
    yield tag
    yield from sentences(text) if text else (r"\&",)


def _marked(sentence: str) -> str:
    """Escape a sentence, and set words in back quotes and names of man pages in bold."""
    parts = sentence.split("`")  # each part with an odd index stood between back quotes
    text = "".join(bold(part) if index % 2 else plain(part) for index, part in enumerate(parts))
    return re.sub(r"(?<![\w\\-])((?:[a-z0-9.]|\\-)+)(\([1-8]\))", r"\\fB\1\\fR\2", text)
