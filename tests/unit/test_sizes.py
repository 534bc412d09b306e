"""Sizes as people write and read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.errors import UsageError
from qedfuse.util.sizes import format_size, parse_size, three_digits
from tests.support import qemu

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("64KiB", 64 << 10),
        ("64kb", 64 << 10),
        (" 1M ", 1 << 20),
        ("10G", 10 << 30),
        ("3T", 3 << 40),
        ("1P", 1 << 50),
        ("7e", 7 << 60),
        ("1.5G", 3 << 29),
        ("1.5GiB", 3 << 29),
        ("0.1p", 112589990684262),
        ("0.00048828125k", 1),
        ("0.00048828124k", 0),
        ("1.99999999999999999999E", 2 << 60),
        ("1.0", 1),
        ("2.b", 2),
    ],
)
def test_parse(text: str, expected: int) -> None:
    """Binary suffixes of either case are parsed, with or without the unit."""
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "K", "-1", "+1", "1 K", "1KK", "0x10", "1Z", "12ib", "1\n2"),
        *("1.5", "1.5B", ".5K", "1..5K", "1,5K", "1.K5"),
        # What Unicode takes for a K or a digit, and more digits than int() reads.
        *("1\u212a", "\u0663", "9" * 5000, "1." + "9" * 5000 + "K"),
    ],
)
def test_parse_refuses(text: str) -> None:
    """Any other text is a usage error in one line that shows it."""
    with pytest.raises(UsageError, match=r"^size: found .*, expected a number of bytes") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 10, "64 KiB"),
        (10 << 30, "10 GiB"),
        (1 << 63, "8 EiB"),
        (5 << 70, "5120 EiB"),
    ],
)
def test_format(size: int, expected: str) -> None:
    """A size is shown in the largest unit that gives at least one."""
    assert format_size(size) == expected


# What qemu-img creates: numbers whose double is not exact, and numbers that are rounded up.
@pytest.mark.parametrize(
    "text", ["1.5G", "1.3k", "0.1G", "12.345M", "0.9999999M", "1.7976931g", "1.1T", "4.35K", "1.K"]
)
def test_fractions_are_those_of_qemu(text: str, tmp_path: Path) -> None:
    """A fraction means the same number of bytes as for qemu-img, which prints the number."""
    done = qemu.run("qemu-img", "create", "-f", "raw", tmp_path / "x", text)
    assert done.stdout.split()[-1] == f"size={parse_size(text)}"


@given(st.integers(1, 1023), st.sampled_from(["", "K", "M", "G", "T", "P", "E"]))
def test_what_is_written_reads_back(number: int, unit: str) -> None:
    """A whole number of units is parsed from what was formatted."""
    size = parse_size(f"{number}{unit}")
    assert parse_size(format_size(size).replace(" ", "").removesuffix("ytes")) == size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00123, "0.00123"), (1.25, "1.25"), (99.94, "99.9"), (99.96, "100"),
     (1048.576, "1049"), (1234567.0, "1234567")],
)  # fmt: skip
def test_three_digits(value: float, text: str) -> None:
    """A number has at least three digits and no exponent, however large it is."""
    assert three_digits(value) == text
