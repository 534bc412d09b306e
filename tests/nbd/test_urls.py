"""URLs of NBD servers: parsed as the NBD project describes them, and compared as prefixes."""

from __future__ import annotations

import pytest

from qedfuse.errors import UsageError
from qedfuse.remote.address import is_below, parse_address, parse_prefix


@pytest.mark.parametrize(
    ("url", "export", "normal"),
    [
        ("nbd://example.com", "", "nbd://example.com/"),
        ("nbd://example.com:10809/disk", "disk", "nbd://example.com/disk"),
        ("nbd://example.com//disk", "/disk", "nbd://example.com//disk"),
        ("nbd://Example.com/hello%20world", "hello world", "nbd://example.com/hello%20world"),
        ("NBDS://[::1]:1/a/b/", "a/b/", "nbds://[::1]:1/a/b/"),
        ("nbds://h/x?tls-hostname=y", "x", "nbds://h/x?tls-hostname=y"),
        ("nbd+unix:///?socket=%2Frun%2Fs", "", "nbd+unix:///?socket=/run/s"),
        (
            "nbds+unix:///e?tls-hostname=h&socket=/run/a%20b",
            "e",
            "nbds+unix:///e?socket=/run/a%20b&tls-hostname=h",
        ),
    ],
)
def test_a_url_names_an_export(url: str, export: str, normal: str) -> None:
    """The path without its first slash is the name of the export, and may be empty."""
    address = parse_address(url)
    assert (address.key, address.url) == (export, normal)
    assert address.shown == normal
    assert parse_address(normal) == address


@pytest.mark.parametrize(
    "url",
    [
        "nbd+unix:///disk",
        "nbd+unix:///?socket=relative",
        "nbd+unix:///?socket=%00/abstract",
        "nbd+unix:///?socket=/a&socket=/b",
        "nbd+unix://host/?socket=/a",
        "nbd://h/x?socket=/a",
        "nbd://h/x?tls-hostname=y",
        "nbds://h/x?tls-verify-peer=0",
        "nbd://user:secret@h/x",
        "nbd://h/%FF",
        "nbd://h/a/../b",
        "nbd://h/" + "x" * 4097,
    ],
)
def test_refused(url: str) -> None:
    """A URL that is not valid is refused with one line that has no secret."""
    with pytest.raises(UsageError, match=r"^nbds?(\+unix)?://\S*: URL ") as caught:
        parse_address(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "prefix", "expected"),
    [
        ("nbd://h/golden/a", "nbd://h/golden", True),
        ("nbd://h/golden2", "nbd://h/golden", False),
        ("nbd://h/a", "nbds://h/", False),
        ("nbd://h:1/a", "nbd://h/", False),
        ("nbd+unix:///a?socket=/s", "nbd+unix:///?socket=/s", True),
        ("nbd+unix:///a?socket=/t", "nbd+unix:///?socket=/s", False),
        ("nbds://h/a?tls-hostname=evil", "nbds://h/", False),
    ],
)
def test_a_prefix_is_about_one_server(url: str, prefix: str, *, expected: bool) -> None:
    """A prefix allows exports of its own server, socket and certificate only."""
    assert is_below(parse_address(url), parse_prefix(prefix)) is expected
