"""Comparing long texts without pytest's diff, and texts that contain temporary paths."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def assert_same_lines(found: str, expected: str) -> None:
    """Fail with the first pair of lines that differ, if two texts are not equal.

    pytest's own diff of 25,000 lines takes minutes, so that a failure looks like a hang.
    """
    if found == expected:
        return
    pairs = zip_longest(found.splitlines(keepends=True), expected.splitlines(keepends=True))
    for number, (ours, theirs) in enumerate(pairs, 1):
        if ours != theirs:
            pytest.fail(f"line {number}: found {ours!r}, expected {theirs!r}")


def without_temporary_directories(text: str, base: Path) -> str:
    """Remove the directories that pytest has made below ``base`` from the paths in a text.

    pytest names them after the test functions, so such a path may contain, by accident, the
    words that a test looks for.
    """
    return re.sub(rf"{re.escape(str(base))}(/[\w-]+)?/?", "", text)
