"""Comparing long texts without pytest's diff."""

from __future__ import annotations

from itertools import zip_longest

import pytest


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
