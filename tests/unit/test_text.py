"""Names are shown unchanged, unless showing them could affect a terminal or a log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.text import printable, without_queries


@pytest.mark.parametrize("name", ["vm.qed", "a b.qed", "Grüße.qed", "C:\\disk.qed", "日本.qed"])
def test_ordinary_names_stay(name: str) -> None:
    """Ordinary names are unchanged, backslashes included."""
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "''"),
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
    """Control characters, direction marks and undecodable bytes are escaped."""
    assert printable(name) == shown


@given(st.binary())
def test_any_bytes_make_one_line(name: bytes) -> None:
    """Any file name is shown in one line."""
    assert printable(name).isprintable()


@given(st.binary(), st.binary())
def test_different_names_stay_different(one: bytes, other: bytes) -> None:
    """Different names are shown differently, unless one looks like an escape."""
    if "\\" not in os.fsdecode(one) + os.fsdecode(other):
        assert (printable(one) == printable(other)) == (os.fsdecode(one) == os.fsdecode(other))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a: b?c", "a: b?c"),
        ("https://h/x: found 1?", "https://h/x: found 1?"),
        ("https://h/x?sig=a%2Fb: found", "https://h/x?...: found"),
        ("found 'HTTPS://h/x?sig=1', expected 2", "found 'HTTPS://h/x?...', expected 2"),
        (
            "unknown: --b=https://h/x?s=1 https://h/y?t=2",
            "unknown: --b=https://h/x?... https://h/y?...",
        ),
        ("https://me:word@h/x@1?s", "https://...@h/x@1?..."),
        ("https://h/x?... (see)", "https://h/x?... (see)"),
        ("s3://b/k?versionId=v1: gone", "s3://b/k?versionId=v1: gone"),
        ("s3://b/k?versionId=v1&sig=2: gone", "s3://b/k?...: gone"),
        ("gs://b/k?sig=2", "gs://b/k?..."),
        ("nbd+unix:///?socket=/run/s: gone", "nbd+unix:///?socket=/run/s: gone"),
    ],
)
def test_secrets_in_messages(message: str, shown: str) -> None:
    """Users and queries of URLs are left out of messages, unless they are not secret."""
    assert without_queries(message) == shown
