"""Checking and normalising the parts of URLs, so that equivalent URLs can be compared."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from qedfuse.errors import UsageError
from qedfuse.text import printable

# The expressions are compiled when first used, because few mounts have URLs.
_HOST: Final = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
_FORBIDDEN: Final = rb"[\x00-\x1f\x7f/\\]"
_MAX_NAME_BYTES: Final = 4096
"""Maximum length of the name of an NBD export; object stores allow only shorter names."""
_SAFE_IN_SEGMENT: Final = "!$&'()*+,;=:@-._~"
"""Characters that a segment of a path may have unescaped (RFC 3986, ``pchar``)."""
_SERVER: Final = r"[A-Za-z][A-Za-z0-9+.-]*://[^/\\?#]*"


def server_part(url: str) -> str:
    """Return a URL up to its path, unchanged; empty if the URL has no scheme."""
    match = re.match(_SERVER, url)
    return match[0] if match else ""


def parse_host(text: str, authority: str, host: str) -> str:
    """Return the normalised host of a URL, without its port.

    Args:
        text: The URL, for messages.
        authority: The part of the URL between ``://`` and the path.
        host: The host in the authority, without brackets.

    Raises:
        UsageError: There is no valid host.
    """
    host = host.lower()
    if "[" in authority or ":" in host:
        with suppress(ValueError):
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        host = f"[{host}]"
    if not re.fullmatch(_HOST, host):
        raise invalid_url(text, "host", host or "none", "a host name or an IP address")
    return host


def parse_path(text: str, path: str) -> str:
    """Return the normalised path of the URL ``text``, without its first slash.

    Raises:
        UsageError: A segment is not valid; see `_segment`.
    """
    segments = path.removeprefix("/").split("/")
    return "/".join(_segment(text, segment) for segment in segments)


def parse_name(text: str, path: str) -> str:
    """Return the normalised path of a URL whose path is the name of an object or export.

    Raises:
        UsageError: A segment is not valid, or the name is too long or not in UTF-8.
    """
    path = parse_path(text, path)
    raw = unquote_to_bytes(path)
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise invalid_url(text, "path", "bytes that are not UTF-8", "a name") from None
    if len(raw) > _MAX_NAME_BYTES:
        raise invalid_url(text, "path", f"{len(raw)} bytes", f"at most {_MAX_NAME_BYTES}")
    return path


def _segment(text: str, segment: str) -> str:
    """Return one normalised segment of a path: only characters that must be escaped are escaped.

    An escaped slash, backslash or control character is refused, because some servers do not treat
    it as part of the segment.
    """
    raw = unquote_to_bytes(segment)
    if raw in (b".", b".."):
        raise invalid_url(text, "path", printable(segment), "no . or .. in it")
    if re.search(_FORBIDDEN, raw):
        expected = "no escaped slash, backslash or control character"
        raise invalid_url(text, "path", printable(segment), expected)
    return quote(raw, safe=_SAFE_IN_SEGMENT)


def parse_version(text: str, query: str) -> str:
    """Return the version of an object that the query of a URL names; empty for no query.

    Raises:
        UsageError: The query is not ``versionId=VERSION``.
    """
    if not query:
        return ""
    name, _, value = query.partition("=")
    # A plus sign stands for itself, and not for a space as in HTML forms.
    raw = unquote_to_bytes(value)
    if name != "versionId" or not raw or "&" in value or not raw.isascii():
        raise invalid_url(text, "query", "another query", "versionId=VERSION or no query")
    return raw.decode()


def invalid_url(text: str, field: str, found: str, expected: str) -> UsageError:
    """Return the error for an invalid part of the URL ``text``; the message hides its secrets.

    If the URL may have a user, ``found`` is not shown if it can be a part of the URL: any part but
    the scheme may belong to the password.
    """
    if "@" in text and field not in {"scheme", "user"}:
        found = "..."
    return UsageError(f"{hide_secrets(text)}: URL {field}: found {found}, expected {expected}")


def hide_secrets(text: str) -> str:
    """Return a URL, which need not be valid, for messages: without user, query and fragment."""
    # A password that is not escaped may contain any character, so its end is unknown.  Therefore
    # only the scheme of a URL with a user is shown.  A fragment is not sent to the server, so some
    # applications pass a secret in it.
    if "@" in text:
        scheme, mark, _ = text.partition("://")
        return f"{printable(scheme) if mark and '@' not in scheme else ''}{mark}..."
    return printable(re.split("[?#]", text)[0])
