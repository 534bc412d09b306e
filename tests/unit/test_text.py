"""Names are shown as they are, unless showing them would do something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.text import printable


@pytest.mark.parametrize("name", ["vm.qed", "a b.qed", "Grüße.qed", "C:\\disk.qed", "", "日本.qed"])
def test_ordinary_names_stay(name: str) -> None:
    """What is harmless is not touched, backslashes included."""
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("a\tb", "a\\tb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("nul\0", "nul\\x00"),
        ("a\\b\n", "a\\\\b\\n"),
        ("right\u202eleft", "right\\u202eleft"),
        ("line\u2028end", "line\\u2028end"),
        (b"\xff.qed", "\\xff.qed"),
        (Path("a\rb"), "a\\rb"),
    ],
)
def test_dangerous_names_are_escaped(name: str | bytes | Path, shown: str) -> None:
    """Control characters, turns of direction and bytes that are no text come out as escapes."""
    assert printable(name) == shown


@given(st.binary())
def test_any_bytes_make_one_line(name: bytes) -> None:
    """Whatever a directory holds, the result prints as one line."""
    assert printable(name).isprintable()


@given(st.binary(), st.binary())
def test_different_names_stay_different(one: bytes, other: bytes) -> None:
    """Two files are never shown under one name, except for one that looks like an escape."""
    if "\\" not in os.fsdecode(one) + os.fsdecode(other):
        assert (printable(one) == printable(other)) == (os.fsdecode(one) == os.fsdecode(other))
