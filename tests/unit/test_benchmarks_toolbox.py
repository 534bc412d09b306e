"""The arithmetic of the toolbox's benchmarks, and the images that they are made on."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.commands import run
from benchmarks.launch import launch
from benchmarks.rounds import rotated_orders
from benchmarks.sparse import build
from benchmarks.toolbox import map_lines, same_maps
from benchmarks.toolfiles import CLUSTER_BYTES, MAX_RUN_CLUSTERS, OVERLAY_COUNT, Files, runs
from benchmarks.tooltasks import MAX_MEMORY_BYTES, MIB, TASKS, Outcome, as_json, markdown
from qedfuse.cli.qedimg.main import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

CHECK = next(task for task in TASKS if task.name == "check")
CREATE = next(task for task in TASKS if task.name == "create")


def outcome(qedimg: list[float], qemu_img: list[float], memory: float = 0) -> Outcome:
    """Return what came out of a check."""
    return Outcome(CHECK, {"qedimg": qedimg, "qemu-img": qemu_img}, {"qedimg": [memory]})


def test_ratio_is_of_medians() -> None:
    """A ratio of medians above one means faster, and one bad round does not move it."""
    found = outcome([1, 50, 1], [2, 2, 0.1])
    assert found.ratio == 2
    assert (found.missed(), found.verdict()) == ([], "met")


def test_missed_targets_are_named() -> None:
    """Missed targets for speed, seconds and memory are named separately."""
    assert outcome([2], [1]).missed() == ["0.50 of qemu-img, expected 1"]
    assert outcome([1], [1], MAX_MEMORY_BYTES).missed() == ["256 MiB, expected less than 256"]
    assert Outcome(CREATE, {"qedimg": [0.31]}).missed() == ["0.31 s, expected 0.3"]
    assert Outcome(CREATE, {"qedimg": [0.29]}).missed() == []
    assert outcome([2], [1]).verdict() == "missed"
    assert Outcome(CHECK, failures=["it broke"]).verdict() == "failed"


def test_table_has_a_row_for_each_task() -> None:
    """A row has medians with their spread, ratios, and the arguments of qemu-img."""
    rows = [outcome([1, 2, 4], [4, 4, 4], 9 * MIB), Outcome(CREATE, failures=["qedimg: it broke"])]
    text = markdown(rows, {"processor": "slow"})
    assert "- processor: slow\n" in text
    assert "| 2 (1 to 4) | 4 (4 to 4) | 2.00 | 1 | 9 | met |" in text
    assert re.search(r"\| 0\.3 s \|.*\| failed \|\n", text)
    assert "- check: `qemu-img check -f qed {source}`\n" in text
    assert text.endswith("- create: qedimg: it broke\n")
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}


def test_data_has_every_figure() -> None:
    """The JSON has every single figure, for plots."""
    data = as_json([outcome([1, 2], [3, 4])], {"processor": "slow"})
    assert data["tasks"][0]["seconds"] == {"qedimg": [1, 2], "qemu-img": [3, 4]}
    assert data["tasks"][0]["ratio"] == pytest.approx(3.5 / 1.5)
    assert data["tasks"][0]["name"] == "check"


def test_tasks_are_of_commands_that_exist() -> None:
    """Each task runs an existing command, has its own name, and its result is compared."""
    assert len({task.name for task in TASKS}) == len(TASKS)
    for task in TASKS:
        assert task.qedimg.split()[0] in COMMANDS
        assert task.qemu_img.split()[:1] in ([], task.qedimg.split()[:1])
        assert bool(task.target) == ("{target}" in task.qedimg)
        assert bool(task.source) == ("{source}" in task.qedimg)
        assert task.expected or "convert" not in task.name


def test_copies_are_compared_at_like_terms() -> None:
    """Either both systems flush their copy to the host's disk, or neither does."""
    copies = [task for task in TASKS if task.name.startswith("convert")]
    assert len(copies) == 6
    for task in copies:
        assert task.qedimg == task.qemu_img
        assert ("-t unsafe" in task.qedimg) == task.name.endswith("unsafe")
        assert ("-t writeback" in task.qedimg) != ("-t unsafe" in task.qedimg)


def test_maps_are_compared_extent_by_extent() -> None:
    """Two maps with the same extents are equal, whatever the layout of their lines."""
    lines = ['[{ "start": 0, "length": 4},\n', '{"length": 8, "start": 4}]\n']
    assert list(map_lines(lines)) == [{"start": 0, "length": 4}, {"start": 4, "length": 8}]
    assert list(map_lines(["[]\n"])) == []
    show = (sys.executable, "-c", "import sys; print(sys.argv[1])")
    same_maps((*show, "".join(lines)), (*show, "".join(lines).replace(" ", "")))
    with pytest.raises(ValueError, match=r"found .*'length': 8.*, expected None"):
        same_maps((*show, "".join(lines)), (*show, lines[0]))
    with pytest.raises(ValueError, match=r"found None, expected .*'length': 8"):
        same_maps((*show, lines[0]), (*show, "".join(lines)))


def test_launch_measures_the_program_alone() -> None:
    """Measurements cover the launched program only, and its exit code is returned."""
    ballast = bytearray(64 * MIB)
    ballast[::4096] = b"x" * (len(ballast) // 4096)
    command = (sys.executable, "-m", "benchmarks.launch")
    small = subprocess.run([*command, "true"], capture_output=True, text=True, check=True)
    _seconds, _busy, memory, code = map(float, small.stdout.split())
    assert memory < 48 * MIB
    assert code == 0
    script = "import sys; x = b'x' * (50 << 20); sys.exit(3)"
    seconds, busy, memory, code = launch([sys.executable, "-c", script])
    assert memory > 50 * MIB
    assert code == 3
    assert min(seconds, busy) > 0


def test_systems_alternate() -> None:
    """Two systems alternate."""
    assert rotated_orders(["qedimg", "qemu-img"], 3) == [
        ["qedimg", "qemu-img"],
        ["qemu-img", "qedimg"],
        ["qedimg", "qemu-img"],
    ]


@pytest.mark.parametrize("run_length", [1, 7, 16])
def test_runs_follow_each_other_in_the_file(tmp_path: Path, run_length: int) -> None:
    """Within a run, adjacent clusters of the disk are adjacent in the file."""
    wanted = 1 << 14
    _clusters, offsets = build(tmp_path / "x.qed", 1 << 30, wanted, run=run_length)
    assert len(np.unique(offsets)) == wanted
    assert offsets.max() - offsets.min() == (wanted - 1) * CLUSTER_BYTES
    together = np.count_nonzero(np.diff(offsets) == CLUSTER_BYTES) + 1
    assert together >= wanted - wanted // run_length
    assert together <= wanted - wanted // run_length + 20
    run("qemu-img", "check", "-q", "-f", "qed", str(tmp_path / "x.qed"))


def test_disk_is_divided_into_runs() -> None:
    """Runs cover the disk from end to end without gaps."""
    end = 0
    for start, length in runs(1000, np.random.default_rng(1)):
        assert start == end
        assert 1 <= length <= MAX_RUN_CLUSTERS
        end += length
    assert end == 1000


def test_disks_read_as_the_flat_files(tmp_path: Path) -> None:
    """QEMU reads from the image and from the chain what the flat files hold."""
    files = Files(tmp_path, 200 * CLUSTER_BYTES, 1 << 30)
    for name in ("mixed", "chain"):
        image, flat = files.path(f"{name}.qed"), files.path(f"{name}.raw")
        run("qemu-img", "compare", "-f", "qed", "-F", "raw", str(image), str(flat))
    assert files.path("mixed.raw").read_bytes() != files.path("chain.raw").read_bytes()
    assert len(list(tmp_path.glob("*.qed"))) == 1 + OVERLAY_COUNT


def test_replacing_a_task_keeps_the_table_whole() -> None:
    """A task that qemu-img lacks has empty cells, not fewer."""
    lonely = replace(outcome([1], [1]), task=CHECK._replace(qemu_img="", ratio=None))
    lonely.seconds.pop("qemu-img")
    rows = [line for line in markdown([lonely], {}).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {8}
