"""File names as text that is safe to print."""

from __future__ import annotations

import os
from typing import Final

_UNDECODABLE: Final = range(0xDC80, 0xDD00)
"""The surrogates by which `os.fsdecode` represents bytes that are not valid UTF-8 (PEP 383)."""


def printable(name: str | bytes | os.PathLike[str]) -> str:
    r"""Return a file name on one line, without characters that control a terminal.

    If all characters of the name are printable, the name is returned unchanged.  Otherwise
    control characters become ``\n``, ``\xNN`` or the like, and undecodable bytes ``\xNN``.
    Other unprintable characters and lone surrogates become ``\xNN``, ``\uNNNN`` or
    ``\UNNNNNNNN``, the shortest that can express them.  Each backslash is doubled.
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
