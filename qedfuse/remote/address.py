"""The address of an object: a URL of an object store or of a web server, normalised.

Two URLs of the same object become the same address wherever that can be known without asking the
server, so that addresses can be compared, and can name entries of the cache.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from qedfuse.errors import UsageError
from qedfuse.text import printable

STORES: Final = ("s3", "gs", "az")
"""Schemes of object stores: S3 and compatible stores, Google Cloud Storage, Azure."""
WEB: Final = ("https", "http")
"""Schemes of web servers."""

_PROTOCOL: Final = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_BUCKET: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
"""The name of a bucket or container; some stores distinguish upper and lower case."""
_ALLOWED: Final = re.compile(r"[!$-;=?-\[\]_a-z~]+")
"""The characters of a URL (RFC 3986), without ``#``: a URL of an object has no fragment."""
_FORBIDDEN: Final = re.compile(rb"[\x00-\x1f\x7f/\\]")
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_SAFE_IN_SEGMENT: Final = "!$&'()*+,;=:@-._~"
"""Characters that a segment of a path may have unescaped (RFC 3986, ``pchar``)."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of an object.

    Attributes:
        scheme: One of `STORES` or `WEB`.
        host: Name of the bucket or container; for a web server, its host and, unless it is the
            default of the scheme, its port.
        path: Path of the object, escaped as in a URL, without a slash at the beginning.
        query: Query of a URL of a web server, without ``?``; it may be a secret, so it is in no
            message.
        version: Version of an object in a store; empty for the latest.
    """

    scheme: str
    host: str
    path: str
    query: str = ""
    version: str = ""

    @property
    def url(self) -> str:
        """The normalised URL."""
        query = self.query or self._version_query
        return f"{self.scheme}://{self.host}/{self.path}" + (f"?{query}" if query else "")

    @property
    def shown(self) -> str:
        """The URL for messages, without its query."""
        query = "..." if self.query else self._version_query
        return printable(
            f"{self.scheme}://{self.host}/{self.path}" + (f"?{query}" if query else "")
        )

    @property
    def _version_query(self) -> str:
        """The query that names the version; empty for the latest one."""
        return f"versionId={quote(self.version, safe='')}" if self.version else ""

    @property
    def key(self) -> str:
        """The path without escapes, as object stores name the object."""
        return unquote_to_bytes(self.path).decode()

    @property
    def is_web(self) -> bool:
        """Whether the object is on a web server and not in an object store."""
        return self.scheme in WEB

    @property
    def is_loopback(self) -> bool:
        """Whether the host is the machine itself, by its name or its IP address."""
        import ipaddress  # noqa: PLC0415  late: this module is loaded for local files as well

        name = urlsplit(f"//{self.host}").hostname or ""
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost"


def is_url(text: str) -> bool:
    """Return whether ``text`` begins with a scheme and ``://``, so that it is not a path.

    ``file://`` is no such scheme, because a path follows ``file:`` as in QEMU.
    """
    return _PROTOCOL.match(text) is not None


def shown_name(name: str) -> str:
    """Return the name of a file for messages: a URL without its query and its user."""
    if not is_url(name):
        return printable(name)
    try:
        return _parse(name).shown
    except UsageError:
        return _without_secrets(name)


def without_secrets(name: str) -> str:
    """Return the name of a local file unchanged, and a URL without its query and its user."""
    return shown_name(name) if is_url(name) else name


def require_local(name: str) -> None:
    """Return if a file is a local one, which can be written to.

    Raises:
        UsageError: The name is a URL.
    """
    if is_url(name):
        msg = f"{shown_name(name)}: found a URL, expected a local file (URLs can only be read)"
        raise UsageError(msg)


def require_storable(name: str, hint: str = "") -> None:
    """Return if an image may store the name of its backing file, for all who may read the image.

    A query may be a secret, and it may expire.

    Args:
        name: The name of the backing file.
        hint: What the user can do instead.

    Raises:
        UsageError: The name is a URL with a query, or a URL that is not valid.
    """
    if is_url(name) and (address := parse_address(name)).query:
        msg = (
            f"{address.shown}: found a URL with a query, expected one without, because the overlay "
            f"stores the URL{hint}"
        )
        raise UsageError(msg)


def parse_address(text: str) -> Address:
    """Return the address that a URL stands for.

    Raises:
        UsageError: The URL is not valid, its scheme is unknown, or it names no object.
    """
    address = _parse(text)
    if not address.path or address.path.endswith("/"):
        raise _invalid(text, "path", "no object", "the path of an object")
    return address


def parse_prefix(text: str) -> Address:
    """Return the address that stands for all objects whose URLs begin with ``text``.

    Raises:
        UsageError: The URL is not valid, its scheme is unknown, or it has a query.
    """
    address = _parse(text)
    if address.query or address.version:
        raise _invalid(text, "query", "one", "none in a prefix")
    return address


def is_below(address: Address, prefix: Address) -> bool:
    """Return whether a prefix, which ends with a whole name of the path, allows an address."""
    if (address.scheme, address.host) != (prefix.scheme, prefix.host):
        return False
    if not prefix.path or address.path == prefix.path:
        return True
    return address.path.startswith(prefix.path.removesuffix("/") + "/")


def _parse(text: str) -> Address:
    """Return the address for a URL whose path may be empty."""
    match = _PROTOCOL.match(text)
    scheme = match[1].lower() if match else ""
    if scheme not in (*STORES, *WEB):
        found = f"{scheme}://" if match else "no scheme"
        expected = ", ".join(f"{known}://" for known in (*STORES, *WEB))
        raise _invalid(text, "scheme", found, f"one of {expected}")
    if not _ALLOWED.fullmatch(text):
        raise _invalid(text, "characters", "one that is not allowed", "%XX for it")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise _invalid(text, "host", "no valid one", "a host name or an IP address") from None
    if "@" in parts.netloc:
        raise _invalid(text, "user", "one", "none (credentials come from the environment)")
    if scheme in STORES:
        bucket = parts.netloc.partition(":")[0]
        if not _BUCKET.fullmatch(bucket):
            raise _invalid(text, "host", bucket or "none", "the name of a bucket or container")
        if port is not None:
            raise _invalid(text, "port", str(port), "none after the name of a bucket")
        path = _path(text, parts.path)
        try:
            unquote_to_bytes(path).decode()
        except UnicodeDecodeError:
            raise _invalid(text, "path", "bytes that are no UTF-8", "the name of a key") from None
        return Address(scheme, bucket, path, version=_version(text, parts.query))
    host = _host(text, parts.netloc, parts.hostname or "")
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    return Address(scheme, host, _path(text, parts.path), parts.query)


def _host(text: str, authority: str, host: str) -> str:
    """Return the host of a URL as it stands in a URL, without its port.

    Raises:
        UsageError: There is no valid host.
    """
    host = host.lower()
    if "[" in authority or ":" in host:
        import ipaddress  # noqa: PLC0415  late: this module is loaded for local files as well

        with suppress(ValueError):
            return f"[{ipaddress.IPv6Address(host).compressed}]"
        host = f"[{host}]"
    if not _HOST.fullmatch(host):
        raise _invalid(text, "host", host or "none", "a host name or an IP address")
    return host


def _path(text: str, path: str) -> str:
    """Return the path of a URL with each segment escaped in the same way."""
    segments = path.removeprefix("/").split("/")
    return "/".join(_segment(text, segment) for segment in segments)


def _segment(text: str, segment: str) -> str:
    """Return one segment of a path, with only those characters escaped that need it.

    Raises:
        UsageError: The segment could lead out of its directory, or could be read as two.
    """
    raw = unquote_to_bytes(segment)
    if raw in (b".", b".."):
        raise _invalid(text, "path", printable(segment), "no . or .. in it")
    if _FORBIDDEN.search(raw):
        raise _invalid(text, "path", printable(segment), "no escaped slash or control character")
    return quote(raw, safe=_SAFE_IN_SEGMENT)


def _version(text: str, query: str) -> str:
    """Return the version that the query of a store's URL names; empty for no query."""
    if not query:
        return ""
    name, _, value = query.partition("=")
    # Not as in forms, where a plus sign stands for a space.
    raw = unquote_to_bytes(value)
    if name != "versionId" or not raw or "&" in value or not raw.isascii():
        raise _invalid(text, "query", "something else", "versionId=VERSION or no query")
    return raw.decode()


def _invalid(text: str, field: str, found: str, expected: str) -> UsageError:
    """Return the error for a URL, whose query and user are not shown."""
    return UsageError(f"{_without_secrets(text)}: URL {field}: found {found}, expected {expected}")


def _without_secrets(text: str) -> str:
    """Return a URL, valid or not, for messages: without what may be its user or its query."""
    # A password may contain each character that would end the user in a valid URL.
    shown = text.partition("://")[0] + "://..." if "@" in text else text.partition("?")[0]
    return printable(shown)
