"""URLs: equal spellings give equal addresses, and no secret is in a message."""

from __future__ import annotations

import os
from typing import Final

from qedfuse.errors import UsageError
from qedfuse.remote.address import (
    is_below,
    is_nbd_url,
    is_url,
    parse_address,
    parse_prefix,
    shown_name,
    without_secrets,
)
from qedfuse.remote.nbdquery import nbd_parameters
from qedfuse.text import without_queries
from tests.fuzz.targets.target import Target, assert_line

_SECRET: Final = "S3cr3tS3cr3t"  # noqa: S105  made up


def check(data: bytes) -> None:
    """Parse a URL, show it, and compare it with itself."""
    text = os.fsdecode(data)
    for shown in (shown_name(text), without_queries(text)):
        assert shown.isprintable() or text.isprintable() is False
    try:
        address = parse_address(text)
    except UsageError as error:
        assert_line(error)
        _assert_no_secret(text, str(error), shown_name(text))
    else:
        assert is_url(text)
        assert address.url.isprintable()
        assert address.shown.isprintable()
        again = parse_address(address.url)
        assert again == address, "the normalised form is another address"
        assert again.url == address.url
        assert is_below(address, address)
        if address.is_nbd:
            assert set(nbd_parameters(address.query)) <= {"socket", "tls-hostname"}
        elif address.is_web and _SECRET not in text.partition("?")[0]:
            assert _SECRET not in address.shown + repr(address) + address.server
        assert without_secrets(text) == address.shown
    try:
        prefix = parse_prefix(text)
    except UsageError as error:
        assert_line(error)
        return
    inside = f"{prefix.url.partition('?')[0].removesuffix('/')}/x"
    query = prefix.url.partition("?")[2]
    assert is_below(parse_address(inside + (f"?{query}" if query else "")), prefix)


def _assert_no_secret(text: str, *shown: str) -> None:
    """Assert that what is shown of an invalid URL has no secret of its query or its user."""
    outside = text.partition("?")[0]
    outside = outside.partition("://")[0] if "@" in text else outside
    if is_url(text) and _SECRET not in outside and not is_nbd_url(text):
        assert not any(_SECRET in item for item in shown), "a secret is shown"


def seeds() -> list[bytes]:
    """Return URLs of each scheme, with users, ports, queries and escapes."""
    texts = (
        f"https://host.example:443/a/b%20c?sig={_SECRET}",
        "http://[::1]:8080/disk.qed",
        f"https://user:{_SECRET}@host/x",
        "s3://bucket/a/b.qed?versionId=3%2B4",
        "s3://bucket//b.qed",
        "gs://bucket/ä",
        "az://container/x.qed",
        "nbd://host:10809/export",
        "nbds://host/?tls-hostname=other",
        "nbd+unix:///name?socket=/run/nbd.sock",
        "nbds+unix:///?socket=%2Frun%2Fx&tls-hostname=h",
        "file:///x",
        "HTTPS://HOST/%7euser/%2e/%C3%A4",
    )
    return [text.encode() for text in texts]


TARGET: Final = Target(
    check,
    seeds,
    (
        b"%2F",
        b"%2e",
        b"..",
        b"?",
        b"#",
        b"@",
        b":",
        b"//",
        b"\x00",
        b"\xff",
        b"[::1]",
        b"socket=/",
        b"%",
        b"&",
        b"+",
        _SECRET.encode(),
        b"versionId=",
        b"%ff",
        b"\n",
        b":99999",
        b"[",
        b"]",
    ),
    max_bytes=600,
)
