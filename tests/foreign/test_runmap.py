"""The map of a disk: its runs, and what it takes from the output of qemu-img."""

from __future__ import annotations

import io
import json
import os
import random

import pytest

from qedfuse.errors import ForeignError
from qedfuse.foreign.mapping import fill_map
from qedfuse.foreign.runmap import UNKNOWN, ZEROS, Part, RunMap


def line(start: int, length: object, **more: object) -> dict[str, object]:
    """Return a range as qemu-img prints it: data at offset 0 of the first image, if not changed."""
    return {
        "start": start,
        "length": length,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": True,
        "offset": 0,
        **more,
    }


def filled(
    text: str, *files: tuple[int, int] | None, capacity: int = 100
) -> tuple[list[Part], str]:
    """Return the map that an output makes, as parts up to its end, and the error or nothing."""
    run_map, error = RunMap(capacity), ""
    try:
        fill_map(run_map, io.BytesIO(os.fsencode(text)), files)
    except ForeignError as failed:
        error = str(failed)
    return list(run_map.parts(0, run_map.end)), error


def printed(*ranges: dict[str, object]) -> str:
    """Return ranges in the form in which qemu-img prints them."""
    return "[" + ",\n".join(map(json.dumps, ranges)) + "]\n"


def test_random_runs() -> None:
    """Every range of a random map has the same bytes, whether looked up as one or one by one."""
    chance = random.Random(1)
    for _ in range(50):
        run_map = RunMap(64)
        bytes_at: list[tuple[int, int]] = []
        for _ in range(chance.randrange(1, 64)):
            length, file = chance.randrange(1, 9), chance.choice((UNKNOWN, ZEROS, 0, 1, 253))
            follows = bytes_at and file >= 0 and chance.random() < 0.5
            offset = bytes_at[-1][1] + 1 if follows else chance.randrange(1 << 54)
            assert run_map.add(length, file, offset if file >= 0 else 0)
            bytes_at += [(file, offset + at if file >= 0 else 0) for at in range(length)]
        assert run_map.end == len(bytes_at)
        for _ in range(50):
            start = chance.randrange(len(bytes_at))
            length = chance.randrange(1, len(bytes_at) - start + 20)
            found = [
                (part.file, part.offset + at if part.file >= 0 else 0)
                for part in run_map.parts(start, length)
                for at in range(part.length)
            ]
            past_end = max(0, start + length - len(bytes_at))
            assert found == bytes_at[start : start + length] + [(UNKNOWN, 0)] * past_end


def test_adjacent_runs_are_one() -> None:
    """A run that continues the last one in the same file needs no room; any other run needs it."""
    run_map = RunMap(2)
    assert run_map.add(10, 3, 100)
    assert run_map.add(5, 3, 110)
    assert list(run_map.parts(0, 15)) == [Part(3, 100, 0, 15)]
    assert run_map.add(5, 4, 115)
    assert run_map.add(1, 4, 120)
    assert not run_map.add(5, 4, 0)
    assert run_map.end == 21
    assert list(run_map.parts(12, 20)) == [
        Part(3, 112, 12, 3),
        Part(4, 115, 15, 6),
        Part(UNKNOWN, 0, 21, 11),
    ]


def test_concurrent_add() -> None:
    """A search between whose reads a run is added finds the whole run, or nothing of it."""

    class AddsBetweenReads:
        """The numbers of a map, to which a run of another file is added after one of the reads."""

        def __init__(self, run_map: RunMap, reads: int) -> None:
            self.run_map = run_map
            self.cells = run_map.cells
            self.reads = reads

        def __len__(self) -> int:
            return len(self.cells)

        def __getitem__(self, index: int) -> int:
            found = self.cells[index]
            self.reads -= 1
            if not self.reads:
                self.run_map.cells = self.cells
                self.run_map.add(10, 7, 500)
            return found

    whole = [Part(3, 100, 0, 10), Part(7, 500, 10, 10)]
    missing = [Part(3, 100, 0, 10), Part(UNKNOWN, 0, 10, 10)]
    seen = []
    for reads in range(1, 9):
        run_map = RunMap(8)
        assert run_map.add(10, 3, 100)
        run_map.cells = AddsBetweenReads(run_map, reads)  # type: ignore[assignment]
        found = list(run_map.parts(0, 20))
        assert found in (whole, missing)
        seen.append(run_map.end == 20)
    assert any(seen)  # runs were added


def test_output() -> None:
    """Data, zeros, compressed data, bases, and data past the end of a file come into the map."""
    text = printed(
        line(0, 100, offset=1000),
        line(100, 50, zero=True),
        line(150, 10, offset=None),
        line(160, 10, compressed=True),
        line(170, 10, depth=1, offset=5),
        line(180, 10, depth=2, offset=5),
        line(190, 20, offset=1990),
        line(210, 5, offset=2000),
        line(215, 5, data=False, present=False),
    )
    for chunked in (text, text.rstrip("\n") + "\n"):
        assert filled(chunked, (0, 2000), (4, 15), None) == (
            [
                Part(0, 1000, 0, 100),
                Part(ZEROS, 0, 100, 50),
                Part(UNKNOWN, 0, 150, 20),
                Part(4, 5, 170, 10),
                Part(UNKNOWN, 0, 180, 10),
                Part(0, 1990, 190, 10),
                Part(UNKNOWN, 0, 200, 20),
            ],
            "",
        )


def test_long_output() -> None:
    """An output of many chunks is read whole; a map that is full ends the reading."""
    ranges = [line(at * 512, 512, offset=(5000 - at) * 512) for at in range(5000)]
    found, error = filled(printed(*ranges), (0, 1 << 30), capacity=5000)
    assert found == [Part(0, (5000 - at) * 512, at * 512, 512) for at in range(5000)]
    assert not error
    found, error = filled(printed(*ranges), (0, 1 << 30), capacity=7)
    assert (len(found), error) == (7, "")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (line(99, 10), "found a range at 99, expected one at 100"),
        (line(101, 10), "found a range at 101, expected one at 100"),
        (line(100, 0), "found a range at 100"),
        (line(100, -5), "found a range at 100"),
        (line(100, 1 << 62), "found a range at 100"),
        (line(100, 10, depth=2), "not a map"),
        (line(100, 10, offset="5"), "not a map"),
        (line(100, 10, offset=0.5), "not a map"),
        (line(100, 0.5), "not a map"),
        (line(100, "10"), "not a map"),
        ({"start": 100}, "not a map"),
        ({**line(0, 1), "start": "x" * 60_000}, "found a range at 'xxx"),
    ],
)
def test_wrong_output(second: dict[str, object], message: str) -> None:
    """Output of another form ends the map there, with one line about it."""
    found, error = filled(printed(line(0, 100), second), (0, 1 << 60))
    assert found == [Part(0, 0, 0, 100)]
    assert message in error
    assert error.isprintable()
    assert len(error) < 200


@pytest.mark.parametrize(
    "text",
    [
        "x\n",
        "[1]\n",
        "[[]]\n",
        "[" * 60_000 + "\n",
        "[" + " " * 200_000,
        '["\udc80"]\n',
        "\udc80" * 60_000 + "\n",
    ],
)
def test_no_objects(text: str) -> None:
    """Output that is not a list of objects gives no map."""
    found, error = filled(text, (0, 1000))
    assert not found
    assert "not a map" in error
    assert len(error) < 200


def test_offsets_before_and_far_past_the_file() -> None:
    """Offsets outside of the file are left to QEMU."""
    text = printed(line(0, 10, offset=-1), line(10, 10, offset=1 << 70), line(20, 10, depth=-1))
    assert filled(text, (0, 1000)) == ([Part(UNKNOWN, 0, 0, 30)], "")
