"""The query of the URL of an NBD server: the path of its socket, and the name in its certificate.

The parameters ``socket`` and ``tls-hostname`` of ``doc/uri.md`` of the NBD project are supported.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote, unquote_to_bytes

from qedfuse.remote.urlsyntax import invalid_url
from qedfuse.text import printable

UNIX_SCHEMES: Final = ("nbd+unix", "nbds+unix")
"""Schemes of servers at a Unix socket."""

_PARAMETERS: Final[dict[str, tuple[str, ...]]] = {
    "nbd": (),
    "nbds": ("tls-hostname",),
    "nbd+unix": ("socket",),
    "nbds+unix": ("socket", "tls-hostname"),
}
_CONTROL: Final = rb"[\x00-\x1f\x7f]"


def nbd_query(text: str, scheme: str, query: str) -> str:
    """Return the normalised query of a URL: escaped parameters in a fixed order.

    Args:
        text: The whole URL, for messages.
        scheme: The scheme of the URL.
        query: The query of the URL, without ``?``.

    Raises:
        UsageError: A parameter is missing, unknown, given twice or not valid.
    """
    allowed = _PARAMETERS[scheme]
    values: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in allowed or name in values:
            expected = " and ".join(f"{known}=" for known in allowed)
            expected = f"{expected}, each at most once" if allowed else "none"
            raise invalid_url(text, "query", printable(name), expected)
        raw = unquote_to_bytes(value)
        if not raw or re.search(_CONTROL, raw):
            found = f"{name}={printable(raw)}"
            expected = "a value that is not empty and has no control characters"
            raise invalid_url(text, "query", found, expected)
        if name == "tls-hostname" and not _is_host_name(raw):
            found = f"{name}={printable(raw)}"
            raise invalid_url(text, "query", found, "a host name or an IP address")
        values[name] = quote(raw, safe="/-._~")
    if "socket" in allowed and not values.get("socket", "").startswith("/"):
        found = values.get("socket") or "no socket"
        raise invalid_url(text, "query", found, "socket=PATH with an absolute path")
    return "&".join(f"{name}={values[name]}" for name in allowed if name in values)


def _is_host_name(raw: bytes) -> bool:
    """Return whether Python's ssl module can compare a certificate with the name ``raw``."""
    try:
        raw.decode().encode("idna")
    except UnicodeError:  # no UTF-8, or a label that is empty or too long
        return False
    return True


def nbd_parameters(query: str) -> dict[str, str]:
    """Return the parameters in a query that `nbd_query` has returned, with unescaped values."""
    pairs = [part.partition("=") for part in query.split("&")] if query else []
    return {name: unquote(value, errors="surrogateescape") for name, _, value in pairs}
