"""Checking and normalising the parts of URLs, so that equivalent URLs can be compared."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from string import ascii_letters, digits
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from qedfuse.errors import UsageError
from qedfuse.text import printable

# The expressions are compiled when first used, because few mounts have URLs.
_HOST: Final = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
_FORBIDDEN: Final = rb"[\x00-\x1f\x7f/\\]"
_DOT_SEGMENT: Final = rb"(?:\A|[/\\])\.\.?(?:[;/\\]|\Z)"
_MAX_HOST_BYTES: Final = 253
_MAX_LABEL_BYTES: Final = 63
"""Maximum lengths of the name of a host, and of each of its parts (RFC 1035, section 2.3.4)."""
_MAX_NAME_BYTES: Final = 4096
"""Maximum length of the name of an NBD export; object stores allow only shorter names."""
_SAFE_IN_SEGMENT: Final = "!$&'()*+,;=:@-._~"
"""Characters that a segment of a path may have unescaped (RFC 3986, ``pchar``)."""
_UNRESERVED: Final = frozenset(f"{ascii_letters}{digits}-._~")
"""Characters that mean the same escaped and unescaped (RFC 3986, section 2.3)."""
_ESCAPE: Final = r"%([0-9A-Fa-f]{2})?"
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
    # The idna codec, which Python uses for the name in a certificate, fails for other labels.
    is_name = all(0 < len(label) <= _MAX_LABEL_BYTES for label in host.split("."))
    if not (is_name and len(host) <= _MAX_HOST_BYTES and re.fullmatch(_HOST, host)):
        raise invalid_url(text, "host", host or "none", "a host name or an IP address")
    return host


def parse_path(text: str, path: str) -> str:
    """Return the normalised path of the URL of a web server, without its first slash.

    Other servers can distinguish ``%2B`` and ``+``: Amazon S3 reads ``+`` as a space.  So only
    `_UNRESERVED` characters lose their escapes, and the other reserved ones stay as given.

    Args:
        text: The URL, for messages.
        path: The path of the URL.

    Raises:
        UsageError: A segment is not valid; see `_check_segments`.
    """
    path = path.removeprefix("/")
    _check_segments(text, path)
    return quote(re.sub(_ESCAPE, _normal_escape, path), safe=f"/%{_SAFE_IN_SEGMENT}")


def parse_name(text: str, path: str) -> str:
    """Return the normalised path of a URL whose path is the name of an object or export.

    The server gets the name without escapes, so only characters that must be escaped stay so.

    Raises:
        UsageError: A segment is not valid, or the name is too long or not in UTF-8.
    """
    path = path.removeprefix("/")
    _check_segments(text, path)
    raw = unquote_to_bytes(path)  # has the same slashes, because none is escaped
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise invalid_url(text, "path", "bytes that are not UTF-8", "a name") from None
    if len(raw) > _MAX_NAME_BYTES:
        raise invalid_url(text, "path", f"{len(raw)} bytes", f"at most {_MAX_NAME_BYTES}")
    return quote(raw, safe=f"/{_SAFE_IN_SEGMENT}")


def _normal_escape(match: re.Match[str]) -> str:
    """Return the normalised form of an escape, or of a ``%`` that begins none."""
    if match[1] is None:
        return "%25"
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()


def _check_segments(text: str, path: str) -> None:
    """Check the segments of a path.

    Raises:
        UsageError: Some servers take a part of a segment for ``.`` or ``..``, or a segment has an
            escaped slash, backslash or control character, which some servers do not treat as part
            of the segment.
    """
    for segment in path.split("/"):
        raw = unquote_to_bytes(segment)
        # Some servers remove parameters (`..;x`) from a segment, or replace escapes twice.
        if any(re.search(_DOT_SEGMENT, form) for form in (raw, unquote_to_bytes(raw))):
            raise invalid_url(text, "path", printable(segment), "no . or .. in it")
        if re.search(_FORBIDDEN, raw):
            expected = "no escaped slash, backslash or control character"
            raise invalid_url(text, "path", printable(segment), expected)


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
