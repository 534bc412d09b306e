"""The benchmarks' arithmetic: no server, no clock."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from benchmarks import reader, report
from benchmarks.catalogue import CELLS, select_cells
from benchmarks.cells import Fio
from benchmarks.commands import run
from benchmarks.comparison import systems_of
from benchmarks.cputime import CpuTime
from benchmarks.images import CLUSTER_BYTES, PART_COUNT, Images
from benchmarks.loads import Result
from benchmarks.outcome import Outcome, mean_ratio

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.cells import Cell
    from benchmarks.systems import System

RATE = replace(
    next(cell for cell in CELLS if cell.name == "randread-4k-16"),
    peer_target=2,
    baseline_target=0.4,
)
SECONDS = next(cell for cell in CELLS if cell.name == "loop-tar")
SVG = "{http://www.w3.org/2000/svg}"
CHAIN = next(cell for cell in CELLS if cell.stage == "chain")
TITLES: Mapping[System, str] = {
    "qedfuse": "qedfuse",
    "qemu": "QEMU 7.2",
    "qemu-root": "QEMU 10.0",
    "baseline": "baseline",
    "single": "one image",
}


def outcome(
    cell: Cell,
    qedfuse: list[float],
    qemu: list[float],
    baseline: list[float],
    root: list[float] | None = None,
) -> Outcome:
    """Return the result of a cell; ``root`` has the figures of a second QEMU."""
    found = Outcome(cell, {"qedfuse": qedfuse, "qemu": qemu, "baseline": baseline}, titles=TITLES)
    if root is not None:
        found.figures["qemu-root"] = root
    return found


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
    assert outcome(RATE, [40], [20], [100]).missed() == []
    assert outcome(RATE, [39], [20], [90]).missed() == ["1.95 of QEMU 7.2, expected 2"]
    assert outcome(RATE, [39], [10], [100]).missed() == ["0.39 of the baseline, expected 0.4"]


def test_target_is_for_the_faster_peer() -> None:
    """The faster of two QEMUs is the one that qedfuse is compared with."""
    assert outcome(RATE, [40], [20], [100], [30]).missed() == ["1.33 of QEMU 10.0, expected 2"]
    assert outcome(RATE, [40], [30], [100], [20]).missed() == ["1.33 of QEMU 7.2, expected 2"]
    assert outcome(RATE, [40], [20], [100], []).peer == "qemu"
    assert not Outcome(RATE, {"qedfuse": [40]}).peer


def test_faster_peer_takes_fewer_seconds() -> None:
    """Where less is better, the faster QEMU is the one with the smaller figure."""
    found = outcome(SECONDS, [2], [3], [1], [2.5])
    assert found.peer == "qemu-root"
    assert found.peer_ratio == 1.25


def test_mean_is_geometric_and_of_the_faster_peer() -> None:
    """The mean of a factor of 8 and one of a half is 2; a cell without a peer has no part in it."""
    cells = [
        outcome(RATE, [80], [10], [100], [5]),
        outcome(RATE, [10], [20], [100]),
        Outcome(RATE, {"qedfuse": [1]}),
    ]
    assert mean_ratio(cells) == pytest.approx(2)
    assert "is 2.00 (target 2.5: missed)" in report.mean_line(cells)
    assert "That of the baseline, a flat file without an image format, is 7.07." in (
        report.mean_line(cells)
    )
    assert mean_ratio([]) is None
    assert "no cell" in report.mean_line([]).lower()


def test_chain_is_held_against_one_image() -> None:
    """The chain is compared with one image, besides its ratio to QEMU."""
    fast = Outcome(CHAIN, {"qedfuse": [90], "single": [100]})
    slow = Outcome(CHAIN, {"qedfuse": [89], "single": [100]})
    assert fast.missed() == []
    assert slow.missed() == ["0.89 of the rate on one image, expected 0.9"]


def test_failure_of_a_peer_is_a_remark() -> None:
    """Wrong data of any QEMU does not fail the run, that of the baseline does."""
    found = outcome(RATE, [1], [1], [1])
    found.fail("qemu-root", "held wrong data", "offset 0")
    assert (found.remarks, found.failures) == (["QEMU 10.0 held wrong data"], [])
    assert found.details == ["QEMU 10.0: offset 0"]
    found.fail("baseline", "failed", "no end")
    assert found.failures == ["baseline failed: no end"]
    assert found.verdict() == "failed"


def test_markdown_has_a_row_for_each_cell() -> None:
    """A row has median, spread, ratio and verdict, and its note is numbered."""
    rows = [
        outcome(RATE, [1, 2, 4], [1, 1, 1], [4, 4, 4]),
        Outcome(CHAIN, {}, ["qedfuse: it broke"]),
    ]
    text = report.markdown(rows, {"processor": "slow"})
    assert "- processor: slow\n" in text
    assert "| cell | unit | qedfuse | QEMU 7.2 | baseline | to QEMU | " in text
    figures = "| 2 (1 to 4) | 1 (1 to 1) | 4 (4 to 4) |"
    assert f"{figures} 2.00 | 2 | 0.50 | 0.4 | 3 (75%) | met |" in text
    assert re.search(r"\[1\] \| IOPS \| - \| - \| - \|.*\| failed \|\n", text)
    assert "\n1. qedfuse: it broke; " in text


def test_equal_notes_are_printed_once() -> None:
    """Rows with the same note share its number."""
    rows = [outcome(RATE, [1], [1], [1]) for _ in range(3)]
    rows[0].fail("qemu", "failed", "offset 0")
    rows[1].fail("baseline", "failed", "no end")
    rows[2].fail("qemu", "failed", "offset 1")
    text = report.markdown(rows, {})
    assert text.count(f"| {RATE.title} [1] |") == 2
    assert text.count(f"| {RATE.title} [2] |") == 1
    assert "\n1. QEMU 7.2 failed\n2. baseline failed: no end\n" in text


def test_markdown_names_the_faster_peer() -> None:
    """With two QEMUs each has a column, and the ratio names the one that it is against."""
    text = report.markdown([outcome(RATE, [9], [2], [10], [3]), outcome(RATE, [9], [3], [10])], {})
    assert "| qedfuse | QEMU 7.2 | QEMU 10.0 | baseline | to QEMU |" in text
    assert "| 3.00 (QEMU 10.0) | 2 |" in text
    assert "| - | 10 (10 to 10) | 3.00 | 2 |" in text


def test_markdown_has_cpu_times() -> None:
    """The second table has user and system time per request and per MiB, of all rounds."""
    found = outcome(RATE, [], [], [])
    found.add("qedfuse", Result(1.0, requests=500, moved=1 << 20), CpuTime(0.004, 0.006))
    found.add("qedfuse", Result(1.0, requests=1500, moved=1 << 20), CpuTime(0.006, 0.014))
    found.add("baseline", Result(1.0), CpuTime(1.0, 1.0))
    text = report.markdown([found], {})
    table = text.partition("CPU time")[2]
    assert "| cell | qedfuse, per request | QEMU 7.2, per request |" in table
    assert "| 5 + 10 | - | - | 5,000 + 10,000 | - | - |" in table


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
    """A row of the plot has a dot for each system and two bars; larger ratios are further right."""
    path = tmp_path / "plot.svg"
    cell = replace(RATE, peer_target=4, baseline_target=0.5)
    report.plot(path, [outcome(cell, [6], [1], [24], [2])])
    rows = ET.parse(path).getroot()  # noqa: S314  our own file
    dots = [float(dot.get("cx", "")) for dot in rows.iter(f"{SVG}circle")][3:]
    bars = [float(bar.get("x1", "")) for bar in rows.iter(f"{SVG}line") if bar.get("stroke-width")]
    assert len(dots) == 3
    assert len(bars) == 2
    to_qemu, to_root, to_baseline = dots
    assert to_baseline < bars[1] < to_root < bars[0] < to_qemu
    names = {text.text for text in rows.iter(f"{SVG}text")}
    assert {"qedfuse / QEMU 7.2", "qedfuse / QEMU 10.0", "qedfuse / baseline"} <= names


def test_plot_with_one_peer(tmp_path: Path) -> None:
    """A system that was not measured is not in the legend."""
    path = tmp_path / "plot.svg"
    report.plot(path, [outcome(RATE, [2], [1], [8])])
    assert "QEMU 10.0" not in path.read_text("utf-8")


def test_names_differ() -> None:
    """Each cell has a name of its own, so it can be run alone."""
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert len({cell.title for cell in CELLS}) == len(CELLS)


def test_targets() -> None:
    """Every cell has a target of at least 1 for QEMU, and the slow ones have higher targets."""
    targets = {cell.name: (cell.peer_target, cell.baseline_target) for cell in CELLS}
    assert all(peer >= 1 for peer, _ in targets.values())
    expected = {
        "fsync-write-4k": (1, None),
        "buffered-fsync-4k": (1, None),
        "loopdio-fsync-4k": (1, None),
        "randread-4k-16-coldhost": (1.2, None),
        "randread-64k-4": (1.5, 0.75),
        "overwrite-4k-16": (1, 0.5),
        "overwrite-4k-16-clean": (1.2, None),
        "overwrite-4k-16-writeback": (1.2, None),
        "overwrite-1m": (1, 0.9),
        "new-write-1m": (1, 0.9),
    }
    assert {name: targets[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("load", "writes", "changed"),
    [
        pytest.param(Fio("randwrite", 4096), 5, 5, id="each block once"),
        pytest.param(Fio("randwrite", 4096), 999, 16, id="all blocks, some twice"),
        pytest.param(Fio("randwrite", 4096, area=32768), 999, 8, id="all blocks of the area"),
        pytest.param(Fio("randrw", 4096), 999, 6, id="nearly half of the blocks"),
    ],
)
def test_blocks_that_writes_change(load: Fio, writes: int, changed: int) -> None:
    """More writes than blocks change each block once, a mixed load fewer than half of them."""
    assert load.min_changed(writes, 65536) == changed


def test_one_image_takes_part_beside_the_chain_only() -> None:
    """The single image is measured only in cells that compare it with the chain."""
    wanted: set[System] = {"single", "baseline", "qemu", "qedfuse"}
    assert systems_of(RATE, wanted) == ["qedfuse", "qemu", "baseline"]
    assert systems_of(CHAIN, wanted) == ["qedfuse", "qemu", "baseline", "single"]


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


def test_parts_follow_each_other_in_the_full_disk(tmp_path: Path) -> None:
    """The disks of a mount differ in content, and their images hold what is expected."""
    images = Images(tmp_path, 16 * CLUSTER_BYTES)
    parts = [images.expected("part", number) for number in range(PART_COUNT)]
    full = images.expected("full")
    assert full is not None
    assert b"".join(part.read_bytes() for part in parts if part) == full.read_bytes()
    image = images.make("part", "qedfuse", 3)
    run("qemu-img", "compare", "-f", "qed", "-F", "raw", str(image), str(parts[3]))


def test_copy_is_a_new_file(tmp_path: Path) -> None:
    """Each copy of an image has the original's content, whatever was written to the one before."""
    images = Images(tmp_path, 16 * CLUSTER_BYTES)
    original = images.make("full", "qedfuse").read_bytes()
    images.copy("full", "qedfuse").write_bytes(b"changed")
    copy = images.copy("full", "qedfuse")
    assert copy.read_bytes() == original
    images.drop("full")
    assert not copy.exists()
