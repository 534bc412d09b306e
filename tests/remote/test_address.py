"""Addresses: equal for URLs of the same object, never wider than what the user allowed."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.errors import UsageError
from qedfuse.remote.address import (
    Address,
    is_below,
    is_url,
    parse_address,
    parse_prefix,
    shown_name,
)
from qedfuse.text import printable

SEGMENT = st.one_of(
    st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@", min_size=1, max_size=8),
    st.builds(lambda code: f"%{code:02X}", st.integers(0x20, 0xFF)),
).filter(lambda text: text not in {".", "..", "%2F", "%5C", "%2E", "%7F"})
RESERVED = "!$&'()*+,;=:@"
"""Characters that a path may have escaped or unescaped, with two meanings."""
PATH = st.lists(SEGMENT, min_size=1, max_size=4).map("/".join)
HOST = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z0-9]{1,5})?", fullmatch=True)
SCHEME = st.sampled_from(["http", "https", "s3", "gs", "az"])


def parsed(url: str) -> Address | None:
    """Return the address of a URL; None if the URL is refused."""
    try:
        return parse_address(url)
    except UsageError:
        return None


@given(SCHEME, HOST, PATH)
def test_normal_form_is_idempotent(scheme: str, host: str, path: str) -> None:
    """The URL of an address stands for the same address."""
    address = parsed(f"{scheme}://{host}/{path}")
    if address is not None:
        assert parse_address(address.url) == address
        assert parse_address(address.url).url == address.url


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_with_one_line(text: str) -> None:
    """A text is a URL, or is refused with one printable line."""
    lines = []
    for prefix in ("", "https://", "s3://b/", "https://h/"):
        for parse in (parse_address, parse_prefix):
            try:
                address = parse(prefix + text)
            except UsageError as error:
                lines.append(str(error))
            else:
                if not address.is_web:
                    lines.append(printable(address.key))
                lines.append(address.shown)
    assert all(line.isprintable() for line in lines)


def test_key_of_a_store_is_text() -> None:
    """A key that is no UTF-8 is refused when it is parsed, not when it is used."""
    assert parse_address("s3://bucket/%C3%A4").key == "ä"
    with pytest.raises(UsageError, match="UTF-8"):
        parse_address("s3://bucket/%FF")
    assert parse_address("https://host/%FF").path == "%FF"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HTTPS://Example.ORG/a", "https://example.org/a"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("http://example.org:080/a", "http://example.org/a"),
        ("https://example.org/%61%2d", "https://example.org/a-"),
        ("https://example.org/%c3%a4", "https://example.org/%C3%A4"),
        ("https://example.org/a?", "https://example.org/a"),
        ("http://[::1]/a", "http://[0:0:0:0:0:0:0:1]/a"),
        ("http://[::FFFF:127.0.0.1]/a", "http://[::ffff:7f00:1]/a"),
        ("https://example.org/a%2bb%3b", "https://example.org/a%2Bb%3B"),
        ("https://example.org/%%41%4%31", "https://example.org/%25A%254%31"),
        ("https://example.org/[a]", "https://example.org/%5Ba%5D"),
        ("s3://bucket/a%2Bb", "s3://bucket/a+b"),
        ("nbd://example.org/a%2Bb", "nbd://example.org/a+b"),
    ],
)
def test_equal_urls_have_equal_addresses(one: str, other: str) -> None:
    """Spellings of one URL become one address."""
    assert parse_address(one) == parse_address(other)
    assert parse_address(one).url == parse_address(other).url


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://h/a", "http://h/a"),
        ("https://h/a", "https://h:444/a"),
        ("https://h/a", "https://h/A"),
        ("https://h/a", "https://h//a"),
        ("https://h/a?x", "https://h/a?y"),
        ("https://h/a%3Fx", "https://h/a?x"),
        *((f"https://h/a%{ord(reserved):X}b", f"https://h/a{reserved}b") for reserved in RESERVED),
        ("https://h/a%252Bb", "https://h/a%2Bb"),
        ("s3://h/a?versionId=1", "s3://h/a?versionId=2"),
    ],
)
def test_other_objects_have_other_addresses(one: str, other: str) -> None:
    """URLs of objects that may differ become addresses that differ."""
    assert parse_address(one) != parse_address(other)
    assert parse_address(one).url != parse_address(other).url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h:abc/x", "URL port: found no valid one, expected a number from 1 to 65535"),
        ("https://h:99999/x", "URL port: found no valid one, expected a number from 1 to 65535"),
        ("https://h:0/x", "URL port: found no valid one, expected a number from 1 to 65535"),
        ("nbd://h:0/x", "URL port: found no valid one, expected a number from 1 to 65535"),
        ("s3://b:abc/x", "URL port: found one, expected none after the name of a bucket"),
        ("s3://b:80/x", "URL port: found one, expected none after the name of a bucket"),
        ("https://[::1/x", "URL host: found no valid one, expected a host name or an IP address"),
        (
            "nbd+unix://h/x",
            "URL host: found one, expected none: write nbd+unix:///EXPORT?socket=PATH",
        ),
    ],
)
def test_message_for_a_host_or_a_port(url: str, expected: str) -> None:
    """The message names the part of the URL that is not valid."""
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert str(caught.value) == f"{url}: {expected}"


@pytest.mark.parametrize(
    "url",
    [
        "https://h/a/../b",
        "https://h/a/%2e%2e/b",
        "https://h/a/.%2E/b",
        "https://h/a/..;/b",
        "https://h/a/..%3Bx/b",
        "https://h/a/..;x",
        "https://h/a/.;/b",
        "https://h/a/%252e%252E/b",
        "https://h/a/..%253b/b",
        "https://h/a/..%252fb",
        "https://h/a%252f..%255Cb",
        "s3://b/a/..;/b",
        "https://h/./b",
        "https://h/%2e/b",
        "https://h/a%2fb",
        "https://h/a%2Fb",
        "https://h/a%5cb",
        "https://h/a%00",
        "https://h/a%0Ab",
        "https://h/a b",
        "https://h/a#b",
        "https://h/a\\b",
        "https://h/ä",
        "https://h",
        "https://h/",
        "https://h/a/",
        "https:///a",
        "https://h:0x50/a",
        "https://h:65536/a",
        "https://h:-1/a",
        "https://[::1/a",
        "https://[::g]/a",
        "https://[1.2.3.4]/a",
        "https://-h/a",
        "https://h./a",
        "https://a..b/c",
        "https://.a/b",
        f"http://{'a' * 64}.b/c",
        f"http://{'a.' * 127}a/c",
        "nbds://a..b/c",
        "nbds://h/a?tls-hostname=a..b",
        "nbds://h/a?tls-hostname=.a",
        f"nbds+unix:///a?socket=/s&tls-hostname={'a' * 64}",
        "nbds://h/a?tls-hostname=%FF",
        "https://user@h/a",
        "https://user:word@h/a",
        "ftp://h/a",
        "file:///etc/passwd",
        "s3://b:80/a",
        "s3://b/a?x=1",
        "s3://b/a?versionId=",
        "s3://b/a?versionId=1&versionId=2",
    ],
)
def test_refused(url: str) -> None:
    """A URL with more than one meaning, with a user or of no object is refused."""
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/..a;/.b/c./...",
        "https://h/a;../b;.",
        "https://h/a%252Fb%252e%255cc",
        f"https://{'a' * 63}.{'b' * 63}/c",
        f"https://{'a.' * 126}a/c",
        "nbds://h/a?tls-hostname=h.",
        "nbds://h/a?tls-hostname=%C3%A4",
        "nbds://h/a?tls-hostname=127.0.0.1",
        f"nbds://h/a?tls-hostname={'a' * 63}",
        "nbd+unix:///a?socket=/%FF..",
    ],
)
def test_accepted(url: str) -> None:
    """A URL that has only one meaning is accepted, also if it resembles one that is refused."""
    assert parse_address(url) == parse_address(parse_address(url).url)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("path", ["/x", "a//b", "a//", "/", "//"])
def test_a_key_with_an_empty_part(scheme: str, path: str) -> None:
    """A URL of a store has no empty part: obstore would use the object x for the key /x."""
    for parse in (parse_address, parse_prefix):
        with pytest.raises(UsageError, match="URL path: found an empty part"):
            parse(f"{scheme}://bucket/{path}")
    assert parse_prefix(f"{scheme}://bucket/a/").path == "a/"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SECRET@h/a",
        "https://SECRET@h/a",
        "https://user:SEC/SECRET@h/a",
        "https://SECRET-/x@h/a",
        "https://SEC!RET/x@h/a",
        "nbd+unix:///e?socket=SE%43RET@b",
        "https://user:80?SECRET@h/a",
        "ftp://user:SECRET@h/a",
        "https://user:SECRET @h/a",
        "https://h/../a?SECRET",
        "https://h:x/a?SECRET",
        "s3://b/a?token=SECRET",
        "https://h/a b?SECRET",
        "https://user@h/a?SECRET",
        "https://user:/SECRET@h/",
        "https://user/SECRET@h/a/",
        "https://h/a#SECRET",
        "https://h/a#SECRET?b",
        "https://h/a?b#SECRET",
        "nbd://h/a#SECRET",
        "ftp://h/a#SECRET",
    ],
)
def test_no_secret_in_an_error(url: str) -> None:
    """The error for a URL shows neither its user nor its query nor its fragment."""
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert not re.search("sec!?ret", str(caught.value), re.IGNORECASE)
    assert not re.search("sec!?ret", shown_name(url), re.IGNORECASE)


@pytest.mark.parametrize("text", ["user:SECRET@h/", "SECRET@h", "user:SECRET@h://x", "a@SECRET?b"])
def test_no_secret_in_an_error_for_a_prefix_without_scheme(text: str) -> None:
    """The error for a URL that lacks its scheme shows no user."""
    with pytest.raises(UsageError, match=r"URL scheme: found no scheme") as caught:
        parse_prefix(text)
    assert "SECRET" not in str(caught.value)


@given(HOST, PATH, st.text(string.ascii_letters, min_size=3))
def test_query_is_not_shown(host: str, path: str, query: str) -> None:
    """What is shown of an address ends where its query begins."""
    address = parsed(f"https://{host}/{path}?{query}=1")
    if address is not None:
        assert address.shown.partition("?")[2] == "..."
        assert address.url.endswith(f"?{query}=1")


@given(SCHEME, HOST, PATH, PATH)
def test_prefix_allows_what_lies_below(scheme: str, host: str, prefix: str, rest: str) -> None:
    """A prefix allows itself and all paths below it, with or without a slash at its end."""
    below = parsed(f"{scheme}://{host}/{prefix}/{rest}")
    if below is not None:
        for end in ("", "/"):
            assert is_below(below, parse_prefix(f"{scheme}://{host}/{prefix}{end}"))
        assert is_below(below, parse_prefix(f"{scheme}://{host}/"))
        assert is_below(below, parse_prefix(f"{scheme}://{host}"))


@given(SCHEME, HOST, PATH, st.text(string.ascii_lowercase, min_size=1, max_size=3))
def test_prefix_matches_no_half_name(scheme: str, host: str, path: str, more: str) -> None:
    """A prefix allows no name of which it is only the beginning."""
    longer, prefix = parsed(f"{scheme}://{host}/{path}{more}"), parsed(f"{scheme}://{host}/{path}")
    if longer is not None and prefix is not None:
        assert not is_below(longer, prefix)
        assert not is_below(prefix, longer)
        assert not is_below(
            parse_address(f"{scheme}://{host}{more}/a"), parse_prefix(f"{scheme}://{host}")
        )


@pytest.mark.parametrize(
    ("url", "prefix"),
    [
        ("https://h/a/b", "http://h/a"),
        ("https://h:444/a/b", "https://h/a"),
        ("https://h.org/a", "https://h/"),
        ("https://xh/a", "https://h/"),
        ("https://h/b", "https://h//"),
        ("https://h/a/b", "https://h/a//"),
        ("https://h/a", "https://h/a/"),
        ("https://h/a%3F/b", "https://h/a%3Fb"),
        ("https://h/a%2Bb/c", "https://h/a+b"),
        ("https://h/a+b/c", "https://h/a%2Bb"),
    ],
)
def test_not_below(url: str, prefix: str) -> None:
    """A prefix allows no other scheme, port, host or directory."""
    assert not is_below(parse_address(url), parse_prefix(prefix))


def test_prefix_has_no_query() -> None:
    """A prefix with a query or a version is refused."""
    for prefix in ("https://h/a?x", "s3://b/a?versionId=1"):
        with pytest.raises(UsageError, match="query"):
            parse_prefix(prefix)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9:80", True),
        ("[::1]:8080", True),
        ("localhost", True),
        ("localhost:80", True),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("example.org", False),
        ("10.0.0.1", False),
        ("2130706433", False),
    ],
)
def test_loopback(host: str, is_loopback: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Only addresses of the machine itself count as such."""
    assert parse_address(f"http://{host}/a").is_loopback is is_loopback


def test_paths_are_no_urls() -> None:
    """A path is taken for a URL only if it begins with a scheme and two slashes."""
    for path in ("disk.qed", "/a://b", "./https://h/a", "a/b://c", "://a", "1a://b", "c:/a"):
        assert not is_url(path)
    for url in ("https://h/a", "S3://b/a", "nbd+unix://a"):
        assert is_url(url)


def test_names_of_buckets_keep_their_case() -> None:
    """A bucket is another one than that with the same name in lower case; a host is the same."""
    assert parse_address("s3://Golden/x").host == "Golden"
    assert parse_address("S3://Golden/x") != parse_address("s3://golden/x")
    assert not is_below(parse_address("s3://Golden/x"), parse_prefix("s3://golden/"))
    assert parse_address("https://Golden/x") == parse_address("https://golden/x")


@pytest.mark.parametrize("given", ["a+b", "a%2Bb"])
def test_a_plus_sign_in_a_version(given: str) -> None:
    """A plus sign in a version stands for itself, as in the names that stores give."""
    address = parse_address(f"s3://b/x?versionId={given}")
    assert address.version == "a+b"
    assert parse_address(address.url) == parse_address(address.shown) == address
