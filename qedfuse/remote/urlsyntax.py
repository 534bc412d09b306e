"""The parts of URLs: each is checked, and escaped in one way, so that URLs can be compared."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from qedfuse.errors import UsageError
from qedfuse.text import printable

_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_FORBIDDEN: Final = re.compile(rb"[\x00-\x1f\x7f/\\]")
_MAX_NAME_BYTES: Final = 4096
"""Maximum length of the name of an export; keys of stores are shorter."""
_SAFE_IN_SEGMENT: Final = "!$&'()*+,;=:@-._~"
"""Characters that a segment of a path may have unescaped (RFC 3986, ``pchar``)."""


def parse_host(text: str, authority: str, host: str) -> str:
    """Return the host of a URL as it stands in a URL, without its port.

    Raises:
        UsageError: There is no valid host.
    """
    host = host.lower()
    if "[" in authority or ":" in host:
        with suppress(ValueError):
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        host = f"[{host}]"
    if not _HOST.fullmatch(host):
        raise invalid_url(text, "host", host or "none", "a host name or an IP address")
    return host


def parse_path(text: str, path: str) -> str:
    """Return the path of a URL with each segment escaped in the same way."""
    segments = path.removeprefix("/").split("/")
    return "/".join(_segment(text, segment) for segment in segments)


def parse_name(text: str, path: str) -> str:
    """Return the path of a URL that stands for a name, escaped.

    Raises:
        UsageError: The name is no text, or is longer than any name.
    """
    path = parse_path(text, path)
    raw = unquote_to_bytes(path)
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise invalid_url(text, "path", "bytes that are no UTF-8", "a name") from None
    if len(raw) > _MAX_NAME_BYTES:
        raise invalid_url(text, "path", f"{len(raw)} bytes", f"at most {_MAX_NAME_BYTES}")
    return path


def _segment(text: str, segment: str) -> str:
    """Return one segment of a path, with only those characters escaped that need it.

    Raises:
        UsageError: The segment could lead out of its directory, or could be read as two.
    """
    raw = unquote_to_bytes(segment)
    if raw in (b".", b".."):
        raise invalid_url(text, "path", printable(segment), "no . or .. in it")
    if _FORBIDDEN.search(raw):
        raise invalid_url(text, "path", printable(segment), "no escaped slash or control character")
    return quote(raw, safe=_SAFE_IN_SEGMENT)


def parse_version(text: str, query: str) -> str:
    """Return the version that the query of a store's URL names; empty for no query."""
    if not query:
        return ""
    name, _, value = query.partition("=")
    # Not as in forms, where a plus sign stands for a space.
    raw = unquote_to_bytes(value)
    if name != "versionId" or not raw or "&" in value or not raw.isascii():
        raise invalid_url(text, "query", "something else", "versionId=VERSION or no query")
    return raw.decode()


def invalid_url(text: str, field: str, found: str, expected: str) -> UsageError:
    """Return the error for a URL, whose query and user are not shown."""
    return UsageError(f"{hide_secrets(text)}: URL {field}: found {found}, expected {expected}")


def hide_secrets(text: str) -> str:
    """Return a URL, valid or not, for messages: without what may be its user or its query."""
    # A password may contain each character that would end the user in a valid URL.
    shown = text.partition("://")[0] + "://..." if "@" in text else text.partition("?")[0]
    return printable(shown)
