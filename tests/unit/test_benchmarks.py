"""The benchmarks' arithmetic: no server, no clock."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from benchmarks import reader, report
from benchmarks.commands import run
from benchmarks.images import CLUSTER_BYTES, Images
from benchmarks.report import Outcome
from benchmarks.rounds import rotated_orders
from benchmarks.speed import systems_of
from benchmarks.targets import CELLS, select_cells

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.cells import Cell

RATE = next(cell for cell in CELLS if cell.name == "randread-4k-16")
SECONDS = next(cell for cell in CELLS if cell.name == "loop-tar")
SVG = "{http://www.w3.org/2000/svg}"
CHAIN = next(cell for cell in CELLS if cell.stage == "chain")


def outcome(cell: Cell, qedfuse: list[float], qemu: list[float], baseline: list[float]) -> Outcome:
    """Return what came out of a cell."""
    return Outcome(cell, {"qedfuse": qedfuse, "qemu": qemu, "baseline": baseline})


def test_ratio_is_of_medians() -> None:
    """The ratio is of medians, so one round that went wrong does not move it."""
    found = outcome(RATE, [60, 1, 50], [20, 25, 1000], [100, 100, 100])
    assert found.ratio("qemu") == 2.0
    assert found.ratio("baseline") == 0.5


def test_seconds_count_the_other_way_round() -> None:
    """More than one means faster, also where less is better."""
    assert outcome(SECONDS, [2, 2, 2], [3, 3, 3], [1, 1, 1]).ratio("qemu") == 1.5


def test_ratio_without_figures() -> None:
    """A system that failed has no ratio, and misses no target."""
    found = Outcome(RATE, {"qedfuse": [5.0]})
    assert found.ratio("qemu") is None
    assert found.missed() == []


def test_missed_targets_are_named() -> None:
    """Each target is compared with its own ratio."""
    cell = replace(RATE, qemu_target=2, baseline_target=0.4)
    assert outcome(cell, [40], [20], [100]).missed() == []
    assert outcome(cell, [39], [20], [90]).missed() == ["1.95 of QEMU, expected 2"]
    assert outcome(cell, [39], [10], [100]).missed() == ["0.39 of the baseline, expected 0.4"]


def test_chain_is_held_against_one_image() -> None:
    """The chain is compared with one image by its cost per read, not by its ratio to QEMU."""
    fast = Outcome(CHAIN, {"qedfuse": [80], "single": [100]})
    slow = Outcome(CHAIN, {"qedfuse": [79], "single": [100]})
    assert fast.missed() == []
    assert slow.missed() == ["1.27 of the cost on one image, expected 1.25"]


def test_markdown_has_a_row_for_each_cell() -> None:
    """A row has median, spread, ratio and verdict, and its note is numbered."""
    rows = [
        outcome(RATE, [1, 2, 4], [1, 1, 1], [4, 4, 4]),
        Outcome(CHAIN, {}, ["qedfuse: it broke"]),
    ]
    text = report.markdown(rows, {"processor": "slow"})
    assert "- processor: slow\n" in text
    assert "| 2 (1 to 4) | 1 (1 to 1) | 4 (4 to 4) | 2.00 | 2 | 0.50 | 0.4 | met |" in text
    assert re.search(r"\[1\] \| IOPS \| - \| - \| - \|.*\| failed \|\n", text)
    assert "\n1. qedfuse: it broke; " in text


def test_filter() -> None:
    """Cells are selected by a regular expression on their names, and matching none is an error."""
    assert [cell.name for cell in select_cells("^read-1m$")] == ["read-1m"]
    assert {cell.loop for cell in select_cells("p-t|o-t")} == {"buffered", "direct"}
    assert select_cells(None) == list(CELLS)
    with pytest.raises(ValueError, match="found no cell for 'nosuch'"):
        select_cells("nosuch")
    with pytest.raises(ValueError, match="expected a regular expression"):
        select_cells("(")


def test_plot_shows_ratios_and_targets(tmp_path: Path) -> None:
    """A row of the plot has two dots and two bars, and a larger ratio is further right."""
    path = tmp_path / "plot.svg"
    report.plot(path, [outcome(replace(RATE, qemu_target=4, baseline_target=0.5), [2], [1], [8])])
    rows = ET.parse(path).getroot()  # noqa: S314  our own file
    dots = [float(dot.get("cx", "")) for dot in rows.iter(f"{SVG}circle")][2:]
    bars = [float(bar.get("x1", "")) for bar in rows.iter(f"{SVG}line") if bar.get("stroke-width")]
    assert len(dots) == len(bars) == 2
    to_qemu, to_baseline = dots
    assert to_baseline < bars[1] < to_qemu < bars[0]


def test_names_differ() -> None:
    """Each cell has a name of its own, so it can be run alone."""
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert len({cell.title for cell in CELLS}) == len(CELLS)


def test_each_system_runs_first_in_turn() -> None:
    """In as many rounds as there are systems, each system runs once at each position."""
    orders = rotated_orders(["qedfuse", "qemu", "baseline"], 3)
    assert orders == [
        ["qedfuse", "qemu", "baseline"],
        ["qemu", "baseline", "qedfuse"],
        ["baseline", "qedfuse", "qemu"],
    ]
    assert len(rotated_orders(["qedfuse"], 5)) == 5


def test_one_image_takes_part_beside_the_chain_only() -> None:
    """The single image is measured only in cells that compare it with the chain."""
    assert systems_of(RATE) == ["qedfuse", "qemu", "baseline"]
    assert systems_of(CHAIN) == ["qedfuse", "qemu", "baseline", "single"]


def test_compare_counts_what_was_written() -> None:
    """A block that was written is as expected, or is counted as missing from its offset."""
    before = bytes(range(1, 65)) * 128
    after = before[:4096] + reader.written(12288, 4096)
    assert reader.compare(before, before, 8192, 4096) == 0
    assert reader.compare(after, before, 8192, 4096) == 1


@pytest.mark.parametrize(
    ("place", "found"),
    [
        pytest.param(4096, reader.written(0, 4096), id="written, but to another place"),
        pytest.param(5000, b"\0", id="a byte"),
        pytest.param(8192 - 512, bytes(512), id="a sector, in the end"),
    ],
)
def test_compare_notices_wrong_data(place: int, found: bytes) -> None:
    """Wrong data is reported with its offset."""
    before = b"\xa5" * 8192
    disk = before[:place] + found + before[place + len(found) :]
    with pytest.raises(ValueError, match=f"^offset {place + 65536}: found"):
        reader.compare(disk, before, 65536, 4096)


def test_compare_notices_that_data_is_missing() -> None:
    """A short read is reported."""
    with pytest.raises(ValueError, match="found 4000 bytes, expected 4096"):
        reader.compare(b"x" * 4000, b"x" * 4096, 0, 0)


def test_check_reads_the_whole_disk(tmp_path: Path) -> None:
    """The check reads the disk up to its last byte."""
    disk, expected = tmp_path / "disk", tmp_path / "expected"
    for path in (disk, expected):
        path.write_bytes(bytes(3 << 20))
    assert reader.check(str(disk), str(expected), 4096, flags=0) == 0
    assert reader.check(str(disk), "-", 0, flags=0) == 0
    with disk.open("r+b") as file:
        file.seek((3 << 20) - 1)
        file.write(b"x")
    with pytest.raises(ValueError, match=f"offset {(3 << 20) - 1}: found 78, expected 00"):
        reader.check(str(disk), str(expected), 4096, flags=0)


def test_chain_reads_as_expected(tmp_path: Path) -> None:
    """The chain has eight layers, and QEMU reads from it what the flat file holds."""
    images = Images(tmp_path, 64 * CLUSTER_BYTES)
    top = images.make("chain", "qedfuse")
    files = images.files("chain", top)
    assert len(files) == 8
    assert files[-1] == top
    flat = images.make("chain", "baseline")
    run("qemu-img", "compare", "-f", "qed", "-F", "raw", str(top), str(flat))
