"""Parts of JSON documents that a fuzzer puts into inputs, for all targets that read JSON."""

from __future__ import annotations

from typing import Final

JSON_TOKENS: Final = (
    b"null",
    b"true",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b":",
    b",",
    b"1e999",
    b"-1",
    b"NaN",
    b"9" * 30,
    b"\\ud800",
    b"\\u0000",
)
