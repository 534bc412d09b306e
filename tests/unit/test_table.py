"""Table entries: conversion to bytes and back, and splitting into runs."""

from __future__ import annotations

import struct
import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.ondisk import table
from qedfuse.ondisk.table import decode, encode, runs

SIZE = 4096
"""Cluster size in these tests, in bytes."""

entry_values = st.one_of(
    st.sampled_from([0, 0, 0, 1, 2, SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
tables = st.lists(entry_values, max_size=60)


@given(tables)
def test_entries_are_little_endian(values: list[int]) -> None:
    """Entries are encoded as little-endian 64-bit numbers and decode to the same values."""
    raw = struct.pack(f"<{len(values)}Q", *values)
    entries = decode(raw)
    assert list(entries) == values
    assert encode(entries, 0, len(entries)) == raw


@given(tables, st.data())
def test_part_of_a_table(values: list[int], data: st.DataObject) -> None:
    """A part of a table is encoded without changing the table."""
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    entries = array("Q", values)
    assert encode(entries, first, last) == struct.pack(f"<{last - first}Q", *values[first:last])
    assert list(entries) == values


def test_hosts_of_the_other_byte_order_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a big-endian host entries are swapped in a copy."""
    monkeypatch.setattr(table, "_BIG_ENDIAN", sys.byteorder == "little")
    assert list(decode(b"\1\2\3\4\5\6\7\x08")) == [int.from_bytes(b"\1\2\3\4\5\6\7\x08", "big")]
    entries = array("Q", [1, 2, 3])
    assert encode(entries, 1, 3) == struct.pack(">2Q", 2, 3)
    assert list(entries) == [1, 2, 3]


def test_part_of_an_entry_is_refused() -> None:
    """Bytes that end within an entry are refused."""
    with pytest.raises(ValueError, match="not a multiple"):
        decode(bytes(9))


def model_runs(values: list[int], first: int, last: int) -> list[tuple[int, int, int]]:
    """Cut a table into runs, one entry at a time."""
    result: list[tuple[int, int, int]] = []
    for index in range(first, last):
        value = values[index]
        if result:
            start, count, head = result[-1]
            expected = head if head <= 1 else head + count * SIZE
            if value == expected:
                result[-1] = (start, count + 1, head)
                continue
        result.append((index, 1, value))
    return result


@given(tables, st.data())
def test_runs_agree_with_a_plain_model(values: list[int], data: st.DataObject) -> None:
    """Runs are as long as possible and cover the range, as in a plain model."""
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    assert list(runs(array("Q", values), first, last, SIZE)) == model_runs(values, first, last)


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, SIZE]), st.integers(1, 5000)), max_size=4),
    st.data(),
)
def test_long_runs_agree_with_a_plain_model(
    parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Long holes, which are skipped in steps, end where they do in a plain model."""
    values: list[int] = []
    for value, count in parts:
        values += [value] * count if value <= 1 else range(SIZE, (count + 1) * SIZE, SIZE)
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    assert list(runs(array("Q", values), first, last, SIZE)) == model_runs(values, first, last)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2047, 2048, 2049])
def test_holes_around_the_step(length: int) -> None:
    """Holes of about the length of a step end where they do in a plain model."""
    entries = array("Q", [SIZE, *[0] * length, SIZE])
    expected = [(0, 1, SIZE), (1, length, 0), (length + 1, 1, SIZE)]
    assert list(runs(entries, 0, length + 2, SIZE)) == expected
