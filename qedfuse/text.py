"""File names and messages as text that is safe to print."""

from __future__ import annotations

import codecs
import os
import re
from typing import Final

_UNDECODABLE: Final = range(0xDC80, 0xDD00)
"""The surrogates by which `os.fsdecode` represents bytes that are not valid UTF-8 (PEP 383)."""
# The expressions are compiled when first used: every program loads this module, few need them.
_USER: Final = r"(?<=://)[^\s/?]*@"
"""The user and the password in a URL."""
_QUERY: Final = (
    r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?]*\?)"  # a URL up to its query
    r"(\S*?)"
    r"(?=['\",:;)]*(?:\s|$))"  # punctuation of the sentence is not part of the query
)
_PUBLIC_QUERY: Final = r"(?i:(?:s3|gs|az)://\S*\?versionId=[^&]*|nbds?(?:\+unix)?://.*)"
"""The URLs whose queries are not secret."""


def shortened(text: str, limit: int) -> str:
    """Return ``text``, cut to ``limit`` characters and three dots if it has more than ``limit``."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(name: str | bytes | os.PathLike[str]) -> str:
    r"""Return a file name on one line, without characters that control a terminal.

    An empty name becomes two quotes.  A name without unprintable characters is returned unchanged.
    In any other name, each backslash is doubled, undecodable bytes become ``\xNN``, and other
    unprintable characters become escapes as in a Python string.
    """
    raw = os.fspath(name)
    text = os.fsdecode(raw)
    if text.isprintable():
        return text or "''"
    out = []
    for char in text:
        code = ord(char)
        if code in _UNDECODABLE:
            out.append(f"\\x{code - 0xDC00:02x}")
        elif char == "\\" or not char.isprintable():
            # `str.encode` would import the module of this codec, which the server of a mount, whose
            # messages pass here, must not do.
            out.append(codecs.unicode_escape_encode(char)[0].decode("ascii"))
        else:
            out.append(char)
    return "".join(out)


def without_queries(message: str) -> str:
    """Return a message with ``...`` for the user and the query of each URL in it.

    The version of an object, and the query for an NBD server, are kept, because they are not
    secret.
    """
    if "://" not in message:
        return message
    return re.sub(_QUERY, _hide_query, re.sub(_USER, "...@", message))


def _hide_query(match: re.Match[str]) -> str:
    """Return the matched URL, with ``...`` for its query unless `_PUBLIC_QUERY` allows the URL."""
    return match[0] if re.fullmatch(_PUBLIC_QUERY, match[0]) else f"{match[1]}..."
