"""Comments, docstrings, messages and pages avoid phrases that readers stumble over."""

from __future__ import annotations

import re
import tokenize
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[2]

PHRASES: Final = {
    "at once": "synchronously, concurrently, atomically or immediately",
    "tells?|told|telling": "report, return, show, notify",
    "whoever|nobody|somebody|anybody": "the caller, the task, the kernel, the guest, the user",
    "amiss": "wrong, corrupt",
    "for good": "permanently",
    "at hand": "in memory, cached",
    "short way|long way": "fast path, slow path",
    "business of": "the fact itself",
    "so many": "the number itself, or up to N",
    "as it is|as they are": "unchanged",
    "is to be|are to be|was to be|were to be": "must be, will be, or the verb itself",
    "(?:that|which|they|it|this) (?:is|are) no (?!longer)[a-z]+": "is not a",
    "he|him|us": "the subject by name",
    "be it": "whether, or a list",
}
"""Phrases that carry several meanings or have no clear subject, and what replaces them."""

PATTERN: Final = re.compile(rf"(?<![\w'`.-])({'|'.join(PHRASES)})(?![\w'`(-])")

SUFFIXES: Final = {".py", ".c", ".md", ".sh"}


def files() -> list[Path]:
    """List the texts that people read."""
    trees = ("qedfuse", "tests", "benchmarks", "examples", "docs")
    found = [path for tree in trees for path in (ROOT / tree).rglob("*") if path.is_file()]
    return sorted(
        path
        for path in (*found, *ROOT.glob("*.md"))
        if path.suffix in SUFFIXES and path != Path(__file__)
    )


def prose(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a file that may have a phrase, with their numbers.

    Of Python these are only comments and strings.
    """
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    if not PATTERN.search(text):  # takes much less time than finding the comments
        return []
    lines = []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in {tokenize.COMMENT, tokenize.STRING}:
                lines += list(enumerate(token.string.splitlines(), token.start[0]))
    return lines


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_phrases(path: Path) -> None:
    """A phrase with a plain equivalent in technical English does not occur."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: {line.strip()}"
        for number, line in prose(path)
        for match in PATTERN.finditer(line)
    ]
    assert found == []
