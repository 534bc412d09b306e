"""Text for people: names made safe to print, byte counts made easy to read."""

from __future__ import annotations

import os
from typing import Final

_UNDECODABLE: Final = range(0xDC80, 0xDD00)
"""os.fsdecode's stand-ins for bytes that are no text."""


def printable(name: str | bytes | os.PathLike[str]) -> str:
    r"""Escape a file name so that it cannot forge a line or drive a terminal.

    Control characters, undecodable bytes and lone surrogates come out as ``\xNN`` or
    ``\uNNNN``; a backslash is doubled only where something else was escaped, so that
    ordinary names stay as they are.
    """
    raw = os.fspath(name)
    text = os.fsdecode(raw)
    if text.isprintable():
        return text
    out = []
    for char in text:
        code = ord(char)
        if code in _UNDECODABLE:
            out.append(f"\\x{code - 0xDC00:02x}")
        elif char == "\\" or not char.isprintable():
            out.append(char.encode("unicode_escape", "backslashreplace").decode("ascii"))
        else:
            out.append(char)
    return "".join(out)
