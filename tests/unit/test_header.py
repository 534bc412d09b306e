"""The header: the range of each field, the message about a bad one, and building the bytes."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.errors import HeaderError, ImageError, NotQedError, UnsupportedError
from qedfuse.ondisk.constants import KNOWN_FEATURES, MAGIC, SECTOR, Feature
from qedfuse.ondisk.header import Header, build_header, parse_header

LAYOUT = struct.Struct("<IIIIQQQQQII")
FIELDS = (
    "magic",
    "cluster_size",
    "table_size",
    "header_size",
    "features",
    "compat_features",
    "autoclear_features",
    "l1_table_offset",
    "image_size",
    "backing_filename_offset",
    "backing_filename_size",
)
GOOD = {
    "magic": MAGIC,
    "cluster_size": 65536,
    "table_size": 4,
    "header_size": 1,
    "features": 0,
    "compat_features": 0,
    "autoclear_features": 0,
    "l1_table_offset": 65536,
    "image_size": 1 << 30,
    "backing_filename_offset": 0,
    "backing_filename_size": 0,
}


def raw(**changes: int) -> bytes:
    """Pack a good header, with some fields changed."""
    fields = {**GOOD, **changes}
    return LAYOUT.pack(*(fields[name] for name in FIELDS))


def test_every_field_is_where_the_specification_says() -> None:
    """A header with a different value in each field parses to these values."""
    changes = {
        "cluster_size": 8192,
        "table_size": 2,
        "header_size": 3,
        "features": KNOWN_FEATURES,
        "compat_features": 1 << 63 | 5,
        "autoclear_features": 1 << 62 | 9,
        "l1_table_offset": 7 * 8192,
        "image_size": 12345 * SECTOR,
        "backing_filename_offset": 100,
        "backing_filename_size": 17,
    }
    header = parse_header(raw(**changes), "image")
    assert {name: getattr(header, name) for name in changes} == changes
    assert build_header(header) == raw(**changes)


def test_bytes_behind_the_header_do_not_matter() -> None:
    """The parser ignores bytes after the header."""
    assert parse_header(raw() + b"name", "image") == parse_header(raw(), "image")


BAD: list[tuple[str, dict[str, int], str, str]] = [
    ("cluster_size", {"cluster_size": 0}, "0", "a power of two from 4096 to 67108864"),
    ("cluster_size", {"cluster_size": 2048}, "2048", "a power of two"),
    ("cluster_size", {"cluster_size": 65537}, "65537", "a power of two"),
    ("cluster_size", {"cluster_size": 1 << 27}, "134217728", "a power of two"),
    ("table_size", {"table_size": 0}, "0", "a power of two from 1 to 16"),
    ("table_size", {"table_size": 3}, "3", "a power of two"),
    ("table_size", {"table_size": 32}, "32", "a power of two"),
    ("image_size", {"image_size": 513}, "513", "a multiple of 512"),
    ("image_size", {"image_size": (64 << 40) + 512}, "70368744178176", "up to 70368744177664"),
    ("image_size", {"image_size": 1 << 63}, "9223372036854775808", "a multiple of 512"),
    ("l1_table_offset", {"l1_table_offset": 0}, "0", "a multiple of 65536 past the header"),
    ("l1_table_offset", {"l1_table_offset": 65537}, "65537", "a multiple of 65536"),
    ("l1_table_offset", {"l1_table_offset": 4096}, "4096", "a multiple of 65536"),
    ("header_size", {"header_size": 2}, "2", "at most 1, because the L1 table begins at cluster 1"),
    ("header_size", {"header_size": 0xFFFFFFFF}, "4294967295", "at most 1"),
    (
        "backing_filename_size",
        {"features": 1, "backing_filename_offset": 64, "backing_filename_size": 4096},
        "4096",
        "at most 4095",
    ),
    (
        "backing_filename_offset",
        {"features": 1, "backing_filename_offset": 65530, "backing_filename_size": 7},
        "65530",
        "a name of 7 bytes inside the header's 65536 bytes",
    ),
    (
        "backing_filename_offset",
        {"features": 1, "backing_filename_offset": 0xFFFFFFFF, "backing_filename_size": 1},
        "4294967295",
        "a name of 1 bytes",
    ),
]


@pytest.mark.parametrize(("field", "changes", "found", "expected"), BAD)
def test_bad_field(field: str, changes: dict[str, int], found: str, expected: str) -> None:
    """A field out of range is refused in one line with file, field, found and expected value."""
    with pytest.raises(HeaderError) as caught:
        parse_header(raw(**changes), "image.qed")
    message = str(caught.value)
    assert message.startswith(f"image.qed: header field {field}: found {found}, expected ")
    assert expected in message
    assert "\n" not in message
    assert caught.value.field == field
    assert caught.value.exit_code == 12


def test_largest_disk_of_large_clusters_is_legal() -> None:
    """A disk of 2**63 - 512 bytes is legal where the tables could address more."""
    size = (1 << 63) - SECTOR
    changes = {"cluster_size": 1 << 26, "table_size": 16, "l1_table_offset": 1 << 26}
    assert parse_header(raw(**changes, image_size=size), "image").image_size == size


@pytest.mark.parametrize(
    "changes",
    [
        {"header_size": 0},
        {"image_size": 0},
        {"backing_filename_size": 5000},
        {"header_size": 4, "l1_table_offset": 4 * 65536},
        {"compat_features": (1 << 64) - 1, "autoclear_features": (1 << 64) - 1},
        {"features": 4},
        {"features": 1 << 60},
        {"l1_table_offset": 1 << 62},
    ],
)
def test_odd_headers_that_are_legal(changes: dict[str, int]) -> None:
    """Unusual headers that QEMU opens are accepted."""
    assert build_header(parse_header(raw(**changes), "image")) == raw(**changes)


@pytest.mark.parametrize("data", [b"", b"Q", b"QFI\xfb" + bytes(100), bytes(64), raw(magic=1)])
def test_not_qed(data: bytes) -> None:
    """A file without the magic is no QED image, and not a damaged one."""
    with pytest.raises(NotQedError, match=r"^image: not a QED image: .*found .*expected"):
        parse_header(data, "image")


@pytest.mark.parametrize("length", [4, 60, 63])
def test_truncated(length: int) -> None:
    """A file that ends within the header is refused as truncated."""
    with pytest.raises(NotQedError) as caught:
        parse_header(raw()[:length], "image")
    assert str(caught.value) == f"image: truncated header: found {length} bytes, expected 64"


def test_unknown_feature_bits_are_named() -> None:
    """Unknown incompatible bits are refused by their numbers."""
    with pytest.raises(UnsupportedError, match=r"bits 0x8000000000000008 \(bit 3, 63\)") as caught:
        parse_header(raw(features=1 << 63 | 8 | KNOWN_FEATURES), "image")
    assert str(caught.value).endswith("expected only bits 0, 1, 2 and 60")
    assert caught.value.exit_code == 14


def test_unknown_features_are_judged_before_other_fields() -> None:
    """Unknown incompatible bits are reported before any bad field."""
    with pytest.raises(UnsupportedError):
        parse_header(raw(features=8, cluster_size=3), "image")


def test_l1_table_must_fit_the_file() -> None:
    """An L1 table that is not completely inside the file is refused."""
    header = parse_header(raw(), "image")
    end = 65536 + 4 * 65536
    assert header.l1_end == end
    header.check_fits(end, "image")
    with pytest.raises(HeaderError, match=r"^image: header field l1_table_offset: found 65536 "):
        header.check_fits(end - 1, "image")


def test_header_of_zero_clusters_still_has_one() -> None:
    """With header_size 0, which QEMU opens, the first cluster is the header's."""
    assert parse_header(raw(header_size=0), "image").header_end == 65536
    assert parse_header(raw(header_size=1), "image").header_end == 65536


def test_bits_are_read_by_name_and_changed_one_by_one() -> None:
    """Each change of a bit keeps all other bits and fields."""
    backing = {"backing_filename_offset": 64, "backing_filename_size": 3}
    changes = {"features": 5, "compat_features": 1 << 40, "autoclear_features": 3, **backing}
    header = parse_header(raw(**changes), "image")
    assert header.has_backing
    assert header.backing_is_raw
    assert not header.need_check
    dirty = header.with_need_check(value=True)
    assert dirty.need_check
    assert dirty == replace(header, features=5 | Feature.NEED_CHECK)
    assert dirty.with_need_check(value=False) == header
    assert header.stale_autoclear == 3
    assert header.without_stale_autoclear() == replace(header, autoclear_features=0)
    listed = header.with_free_list(value=True)
    assert listed.has_free_list
    assert listed == replace(header, features=5 | 1 << 60)
    assert listed.with_free_list(value=False) == header
    assert header.with_size(512) == replace(header, image_size=512)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Draw headers that are legal."""
    cluster_size = 1 << draw(st.integers(12, 26))
    table_size = 1 << draw(st.integers(0, 4))
    header_size = draw(st.integers(1, 1000))
    l1_cluster = draw(st.integers(header_size, 1 << 30))
    small: dict[str, Any] = {
        "features": draw(st.integers(0, 3)) << 1 | draw(st.integers(0, 1)) << 60,
        "compat_features": draw(st.integers(0, (1 << 64) - 1)),
        "autoclear_features": draw(st.integers(0, (1 << 64) - 1)),
    }
    if draw(st.booleans()):
        length = draw(st.integers(1, 4095))
        small["features"] |= 1
        small["backing_filename_size"] = length
        last = min(header_size * cluster_size - length, (1 << 32) - 1)
        small["backing_filename_offset"] = draw(st.integers(0, last))
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=header_size,
        l1_table_offset=l1_cluster * cluster_size,
        image_size=0,
        **small,
    )
    sectors = draw(st.integers(0, header.geometry.max_image_size // SECTOR))
    return header.with_size(sectors * SECTOR)


@given(headers())
def test_round_trip(header: Header) -> None:
    """A header that is built parses to the same values."""
    data = build_header(header)
    assert len(data) == 64
    assert parse_header(data, "image") == header


def outcome(data: bytes) -> bytes | None:
    """Parse and build; None if the bytes are refused in one line as they should be."""
    try:
        return build_header(parse_header(data, "image"))
    except ImageError as error:
        message = str(error)
    assert message.startswith("image: ")
    assert "expected" in message
    assert "\n" not in message
    return None


@given(st.binary(min_size=56, max_size=70))
def test_any_bytes_parse_or_are_refused_in_one_line(data: bytes) -> None:
    """Any bytes parse to a header in range or are refused in one line."""
    data = raw()[:4] + data
    assert outcome(data) in (data[:64], None)


@given(st.sampled_from(FIELDS), st.one_of(st.integers(0, 70), st.integers(0, (1 << 64) - 1)))
def test_one_changed_field(field: str, value: int) -> None:
    """Any value of one field gives a header that round-trips, or a refusal in one line."""
    narrow = field not in FIELDS[4:9]
    data = raw(**{field: value & 0xFFFFFFFF if narrow else value})
    assert outcome(data) in (data, None)


def test_an_empty_backing_name_is_none() -> None:
    """An image with an empty backing name has no base, as in QEMU."""
    assert not parse_header(raw(features=1), "image.qed").has_backing
