"""Walking through the tables of a sparse file, with trio and without."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from qedfuse.hostio.imagefile import open_image_file
from qedfuse.hostio.sparse import data_slices
from qedfuse.hostio.tablewalk import DataSlices, holds_data, read_table
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, slice_start

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.posixfile import PosixFile

TABLE = 3 * SLICE_BYTES + 4096
"""File offset of the table: no multiple of a slice."""


def make_sparse(path: Path, slices: int, used: set[int]) -> None:
    """Write a file with a table of ``slices`` slices, of which all but the ``used`` are holes."""
    with path.open("wb") as file:
        file.truncate(TABLE + slices * SLICE_BYTES)
        for number in used:
            # Not at the beginning of the slice: the host finds data within it.
            file.seek(TABLE + number * SLICE_BYTES + SLICE_BYTES // 2)
            file.write((number + 1).to_bytes(8, "little"))


async def slices_of(file: PosixFile, length: int, **options: int) -> list[int]:
    """List the slices with data that the asynchronous walk visits."""
    return [offset async for offset in DataSlices(file, TABLE, length, **options)]


@pytest.mark.parametrize("seed", range(8))
async def test_both_walks_visit_the_slices_that_hold_data(seed: int, tmp_path: Path) -> None:
    """The walk with trio and the one without visit the same slices, in ascending order."""
    choice = random.Random(seed)
    used = set(choice.sample(range(16), choice.randrange(17)))
    length = 16 * SLICE_BYTES
    path = tmp_path / "image"
    make_sparse(path, 16, used)
    expected = [TABLE + number * SLICE_BYTES for number in sorted(used)]
    with open_image_file(str(path), None) as file:
        assert await slices_of(file, length) == expected
        assert list(data_slices(file.fd, TABLE, length)) == expected
        for offset in expected:
            assert await holds_data(file, offset, SLICE_BYTES)


async def test_a_table_is_read_with_the_index_of_each_slice(tmp_path: Path) -> None:
    """The entries of a slice come with the index of its first entry; holes are left out."""
    path = tmp_path / "image"
    make_sparse(path, 8, {2, 5})
    per_slice = SLICE_BYTES // ENTRY_BYTES
    with open_image_file(str(path), None) as file:
        found = {
            first + int(at): int(values[at])
            async for first, values in read_table(file, TABLE, 8 * SLICE_BYTES)
            for at in np.flatnonzero(values)
        }
    assert found == {2 * per_slice + per_slice // 2: 3, 5 * per_slice + per_slice // 2: 6}


async def test_a_walk_ends_with_its_length_and_skips_its_beginning(tmp_path: Path) -> None:
    """Data before the part that is asked for, and after it, is not visited."""
    path = tmp_path / "image"
    make_sparse(path, 8, {0, 3, 6})
    with open_image_file(str(path), None) as file:
        only = [TABLE + 3 * SLICE_BYTES]
        assert await slices_of(file, 6 * SLICE_BYTES, skip=SLICE_BYTES) == only
        assert await slices_of(file, 0) == []
        whole = await slices_of(file, 8 * SLICE_BYTES, slice_bytes=4 * SLICE_BYTES)
        assert whole == [TABLE, TABLE + 4 * SLICE_BYTES]


async def test_other_tasks_run_once_for_each_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk lets other tasks run before each slice, and not after the last one of a table."""
    path = tmp_path / "image"
    make_sparse(path, 4, {1, 3})
    checkpoint, count = trio.lowlevel.checkpoint, 0

    async def counted() -> None:
        nonlocal count
        count += 1
        await checkpoint()

    with open_image_file(str(path), None) as file:
        monkeypatch.setattr(trio.lowlevel, "checkpoint", counted)
        assert len(await slices_of(file, 4 * SLICE_BYTES)) == count == 2


async def test_a_table_that_the_file_cuts_short_is_read_up_to_its_last_whole_entry(
    tmp_path: Path,
) -> None:
    """A part of an entry at the end of the file is no entry."""
    path = tmp_path / "image"
    path.write_bytes(b"\1" * (TABLE + 3 * ENTRY_BYTES + 5))
    with open_image_file(str(path), None) as file:
        lengths = [len(values) async for _first, values in read_table(file, TABLE, SLICE_BYTES)]
    assert lengths == [3]


def test_slices_begin_at_multiples_from_the_table() -> None:
    """The slice of an offset depends on where the table begins, not on the file."""
    assert slice_start(TABLE, TABLE) == TABLE
    assert slice_start(TABLE, TABLE + SLICE_BYTES - 1) == TABLE
    assert slice_start(TABLE, TABLE + SLICE_BYTES) == TABLE + SLICE_BYTES
