"""The address of an object: a URL of an object store, a web server or an NBD server, normalised.

Equivalent spellings of a URL give equal addresses, so addresses can identify entries of the cache.
The query for a web server is not normalised, because only that server knows what it means.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_to_bytes, urlsplit

from qedfuse.errors import UsageError
from qedfuse.remote.nbdquery import UNIX_SCHEMES, nbd_query
from qedfuse.remote.urlsyntax import (
    hide_secrets,
    invalid_url,
    parse_host,
    parse_name,
    parse_path,
    parse_version,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from urllib.parse import SplitResult

STORES: Final = ("s3", "gs", "az")
"""Schemes of object stores: S3 and compatible stores, Google Cloud Storage, Azure."""
WEB: Final = ("https", "http")
"""Schemes of web servers."""
NBD: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
"""Schemes of NBD servers (``doc/uri.md`` of the NBD project).  Those with ``nbds`` use TLS."""

_URL_START: Final = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
"""The name of a bucket or container; some stores distinguish upper and lower case."""
_URL_CHARACTERS: Final = r"[!$-;=?-\[\]_a-z~]+"
"""The characters of a URL (RFC 3986), without ``#``: a URL of an object has no fragment."""
_DEFAULT_PORTS: Final = {"https": 443, "http": 80, "nbd": 10809, "nbds": 10809}


@dataclass(frozen=True, slots=True)
class Address:
    """The address of an object.

    Attributes:
        scheme: One of `STORES`, `WEB` or `NBD`.
        host: For a store: name of the bucket or container.  For a server: its host, with ``:PORT``
            unless the port is the default.  Empty for a Unix socket.
        path: Path of the object, or name of the export, escaped, without a slash at the beginning.
        query: Query for a web server or an NBD server, without ``?``.  The query for a web server
            may be a secret, so no message contains it.
        version: Version of an object in a store; empty for the latest version.
    """

    scheme: str
    host: str
    path: str
    query: str = field(default="", repr=False)
    version: str = ""

    @property
    def url(self) -> str:
        """The normalised URL."""
        query = self.query or self._version_query
        return f"{self.scheme}://{self.host}/{self.path}" + (f"?{query}" if query else "")

    @property
    def port(self) -> int | None:
        """The TCP port of the server; None for a store or a Unix socket."""
        if not self.host or self.scheme not in _DEFAULT_PORTS:
            return None
        port = self.host.rpartition("]")[2].partition(":")[2]
        return int(port) if port else _DEFAULT_PORTS[self.scheme]

    @property
    def hostname(self) -> str:
        """The host of a server, without the port and without brackets."""
        return urlsplit(f"//{self.host}").hostname or ""

    @property
    def server(self) -> str:
        """The prefix (`parse_prefix`) of all objects of the server or bucket, for messages."""
        query = f"?{self.query}" if self.is_nbd and self.query else ""
        return printable(f"{self.scheme}://{self.host}/{query}")

    @property
    def shown(self) -> str:
        """The URL for messages, with ``?...`` for the query of a web server."""
        if self.is_nbd:
            return printable(self.url)
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
        """The path without escapes: the key by which an object store knows the object."""
        return unquote_to_bytes(self.path).decode()

    @property
    def is_web(self) -> bool:
        """Whether the object is on a web server and not in an object store."""
        return self.scheme in WEB

    @property
    def is_nbd(self) -> bool:
        """Whether the object is an export of an NBD server."""
        return self.scheme in NBD

    @property
    def may_have_secret(self) -> bool:
        """Whether the query may be a secret; if so, no image may store the URL."""
        return bool(self.query) and not self.is_nbd

    @property
    def is_loopback(self) -> bool:
        """Whether the host is ``localhost`` or a loopback address."""
        try:
            return ipaddress.ip_address(self.hostname).is_loopback
        except ValueError:
            return self.hostname == "localhost"


def is_url(text: str) -> bool:
    """Return whether ``text`` begins with a scheme and ``://``; ``file://`` does not count."""
    return _URL_START.match(text) is not None


def is_nbd_url(name: str) -> bool:
    """Return whether the name of a file is a URL of an NBD server."""
    match = _URL_START.match(name)
    return match is not None and match[1].lower() in NBD


def shown_name(name: str) -> str:
    """Return the name of a file for messages, without parts that may be secret.

    A URL is shown without its user, and without the query for a web server.
    """
    if not is_url(name):
        return printable(name)
    try:
        # Not `_parse`: in a URL that names no object, an ``@`` may end a password with a slash.
        return parse_address(name).shown
    except UsageError:
        return hide_secrets(name)


def without_secrets(name: str) -> str:
    """Return the name of a local file unchanged, and a URL as `shown_name` returns it."""
    return shown_name(name) if is_url(name) else name


def require_local(name: str) -> None:
    """Refuse a URL as the name of a file that will be written to.

    Raises:
        UsageError: The name is a URL.
    """
    if is_url(name):
        msg = f"{shown_name(name)}: found a URL, expected a local file (URLs can only be read)"
        raise UsageError(msg)


def require_storable(name: str, hint: str = "") -> None:
    """Refuse a URL of a web server with a query: an image must not store it as a backing file.

    Every user who can read the image can read the URL, and its query can be a secret.

    Args:
        name: The name of the backing file.
        hint: The end of the message: what the user can do instead.

    Raises:
        UsageError: The name is a URL of a web server with a query, or a URL that `parse_address`
            refuses.
    """
    if is_url(name) and (address := parse_address(name)).may_have_secret:
        msg = (
            f"{address.shown}: found a URL with a query, expected one without, because the overlay "
            f"stores the URL{hint}"
        )
        raise UsageError(msg)


def parse_address(text: str) -> Address:
    """Return the address of the object that a URL names.

    Raises:
        UsageError: The URL is not valid, its scheme is unknown, or the URL names no object.
    """
    address = _parse(text)
    if not address.is_nbd and (not address.path or address.path.endswith("/")):
        raise invalid_url(text, "path", "no object", "the path of an object")
    return address


def parse_prefix(text: str) -> Address:
    """Return the address of a prefix, which stands for all objects below it (`is_below`).

    Raises:
        UsageError: The URL is not valid, its scheme is unknown, or it has a query and is not the
            URL of an NBD server.
    """
    address = _parse(text)
    if address.may_have_secret or address.version:
        raise invalid_url(text, "query", "one", "none in a prefix")
    return address


def is_below(address: Address, prefix: Address) -> bool:
    """Return whether an address is ``prefix`` itself, or lies below it.

    A prefix ends with a whole component of the path: ``/gold`` does not cover ``/golden``.
    """
    if (address.scheme, address.host) != (prefix.scheme, prefix.host):
        return False
    if address.is_nbd and address.query != prefix.query:  # the socket or the TLS host name differs
        return False
    if not prefix.path or address.path == prefix.path:
        return True
    return address.path.startswith(prefix.path.removesuffix("/") + "/")


def _parse(text: str) -> Address:
    """Return the address for a URL, whose path may be empty."""
    match = _URL_START.match(text)
    scheme = match[1].lower() if match else ""
    if scheme not in (*STORES, *WEB, *NBD):
        found = f"{scheme}://" if match else "no scheme"
        expected = ", ".join(f"{known}://" for known in (*STORES, *WEB, *NBD))
        raise invalid_url(text, "scheme", found, f"one of {expected}")
    if not re.fullmatch(_URL_CHARACTERS, text):
        raise invalid_url(text, "characters", "one that is not allowed", "%XX for it")
    try:
        parts = urlsplit(text)
    except ValueError:
        raise invalid_url(text, "host", "no valid one", "a host name or an IP address") from None
    if "@" in parts.netloc:
        raise invalid_url(
            text, "user", "one", "none (credentials come from a file or the environment)"
        )
    if scheme in UNIX_SCHEMES and parts.netloc:
        raise invalid_url(text, "host", "one", f"none: write {scheme}:///EXPORT?socket=PATH")
    if scheme in STORES:
        return _store_address(text, parts)
    port = _port(text, parts)
    host = "" if scheme in UNIX_SCHEMES else parse_host(text, parts.netloc, parts.hostname or "")
    if port is not None and port != _DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    if scheme in NBD:
        return Address(
            scheme, host, parse_name(text, parts.path), nbd_query(text, scheme, parts.query)
        )
    return Address(scheme, host, parse_path(text, parts.path), parts.query)


def _port(text: str, parts: SplitResult) -> int | None:
    """Return the port of a URL; None if the URL has none."""
    try:
        port = parts.port
    except ValueError:
        port = 0  # refused below, like port 0
    if port == 0:
        raise invalid_url(text, "port", "no valid one", "a number from 1 to 65535")
    return port


def _store_address(text: str, parts: SplitResult) -> Address:
    """Return the address for a URL of an object store."""
    bucket, _, port = parts.netloc.partition(":")
    if not re.fullmatch(_BUCKET, bucket):
        raise invalid_url(text, "host", bucket or "none", "the name of a bucket or container")
    if port:
        raise invalid_url(text, "port", "one", "none after the name of a bucket")
    path = parse_name(text, parts.path)
    # In stores, `/x` and `x` are two objects, but obstore removes a slash at the beginning of a key
    # and would use the other object.  It has no form for keys with other empty parts.
    if path.startswith("/") or "//" in path:
        raise invalid_url(text, "path", "an empty part", "a key without empty parts")
    return Address(parts.scheme, bucket, path, version=parse_version(text, parts.query))
