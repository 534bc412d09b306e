"""The pictures of ``qedimg map``, compared with the tables of the image."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
import trio

from qedfuse.cli.qedimg import mappicture
from qedfuse.cli.qedimg.main import main
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.inspection.layout import Layout, read_layout
from tests.support import qemu
from tests.support.chains import draw_image
from tests.support.disks import build_image

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]
CLUSTER = 65536


def layout_of(image: Path, cells: int) -> Layout:
    """Read how an image is laid out."""

    async def read() -> Layout:
        file = PosixFile.open(str(image))
        try:
            return await read_layout(file, await read_header(file), cells, cells)
        finally:
            file.close()

    return trio.run(read)


def test_the_entries_past_the_end_of_an_empty_disk_are_not_counted(
    tmp_path: Path, capsys: Captured
) -> None:
    """A disk of 0 bytes has no data, even if a table has an entry."""
    image = qemu.create(tmp_path / "empty.qed", CLUSTER)
    qemu.io(image, f"write -P 1 0 {CLUSTER}")
    with image.open("r+b") as file:
        file.seek(48)
        file.write(bytes(8))
    layout = layout_of(image, 7)
    assert layout.table_clusters > 0
    assert layout.data_clusters == 0
    assert (layout.disk_bytes, layout.disk_clusters, layout.disk_data.tolist()) == (0, 0, [])
    for form in ("picture", "svg"):
        assert main(["map", "--output", form, str(image)]) == 0
        output = capsys.readouterr()
        assert not output.err
        assert "disk, 0 bytes:" in output.out
        assert form == "svg" or output.out.splitlines()[1].startswith("file, ")


@pytest.mark.parametrize("seed", range(12))
def test_the_counts_are_those_of_other_commands(
    seed: int, tmp_path: Path, capsys: Captured
) -> None:
    """Data, zeros, runs and what nothing refers to are what QEMU's map and the check count."""
    image = draw_image(tmp_path / "a.qed", random.Random(seed))
    layout = layout_of(image, random.Random(seed).choice((1, 7, 64, 100_000)))
    assert main(["info", "--allocation", "--output", "json", str(image)]) == 0
    allocation = json.loads(capsys.readouterr().out)["format-specific"]["data"]["allocation"]
    assert layout.data_clusters == allocation["data-clusters"]
    assert int(layout.disk_data.sum()) == allocation["data-clusters"]
    assert int(layout.disk_zeros.sum()) == allocation["zero-clusters"]
    main(["check", "--output", "json", str(image)])
    assert layout.free_clusters == json.loads(capsys.readouterr().out).get("leaks", 0)
    assert not layout.bad
    found = subprocess.run(
        ["qemu-img", "map", "--output", "json", "-f", "qed", image],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    extents = [item for item in json.loads(found.stdout) if item["data"]]
    breaks = sum(
        one["start"] + one["length"] != other["start"]
        or one["offset"] + one["length"] != other["offset"]
        for one, other in pairwise(extents)
    )
    assert layout.runs == breaks + bool(extents)


def test_each_cluster_is_in_its_cell(tmp_path: Path) -> None:
    """With a cell for each cluster, the cells are the clusters of the file and of the disk."""
    image = tmp_path / "a.qed"
    qemu.create(image, 100 * CLUSTER)
    qemu.io(image, *(f"write -P 1 {at * CLUSTER} {CLUSTER}" for at in (90, 3, 50)))
    layout = layout_of(image, 1000)
    assert (layout.tables + layout.data).tolist() == [1] * layout.file_clusters
    # QEMU puts the clusters into the file in the order of the writes.
    assert layout.positions[layout.data == 1].tolist() == [0.9, 0.03, 0.5]
    assert layout.disk_data.nonzero()[0].tolist() == [3, 50, 90]
    assert (layout.runs, layout.free_clusters) == (3, 0)


def test_the_cells_have_all_clusters(tmp_path: Path) -> None:
    """The clusters of the cells add up to those of the file and of the disk."""
    image = tmp_path / "a.qed"
    qemu.create(image, 1000 * CLUSTER)
    qemu.io(image, f"write -P 1 0 {700 * CLUSTER}")
    for cells in (1, 3, 64, 999):
        layout = layout_of(image, cells)
        of_file = layout.cell_clusters(len(layout.data), of_file=True)
        of_disk = layout.cell_clusters(len(layout.disk_data), of_file=False)
        assert (int(of_file.sum()), int(of_disk.sum())) == (layout.file_clusters, 1000)
        assert (layout.data + layout.tables <= of_file).all()
        assert (layout.disk_data <= of_disk).all()


@pytest.mark.parametrize("cells", [1, 7, 1000])
def test_the_clusters_of_a_long_header_are_counted(tmp_path: Path, cells: int) -> None:
    """Each cell has those of its clusters that belong to the header or to a table."""
    image = tmp_path / "a.qed"
    image.write_bytes(build_image(1 << 20, {3: b"a"}, header_size=20) + bytes(5 * 4096))
    layout = layout_of(image, cells)
    count = len(layout.tables)
    expected = [0] * count
    # 20 clusters of the header, the L1 and the L2 table, one cluster of data, and 5 free ones.
    for cluster in range(22):
        expected[cluster * count // 28] += 1
    assert layout.tables.tolist() == expected
    assert (layout.file_clusters, layout.free_clusters) == (28, 5)


def test_memory_does_not_grow_with_the_header(tmp_path: Path) -> None:
    """A header that claims most of a huge sparse file needs no list of its clusters."""
    image = tmp_path / "a.qed"
    claimed, l1_table = 1 << 26, 4096
    start = bytearray(build_image(1 << 20)[:64])
    start[12:16] = claimed.to_bytes(4, "little")
    start[40:48] = (claimed * 4096).to_bytes(8, "little")
    image.write_bytes(start)
    os.truncate(image, claimed * 4096 + l1_table)
    assert main(["map", "--output", "picture", str(image)]) == 0  # loads modules
    tracemalloc.start()
    try:
        layout = layout_of(image, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layout.table_clusters == layout.file_clusters == claimed + 1
    assert peak < 8 << 20


def test_invalid_entries_are_counted_apart(tmp_path: Path, capsys: Captured) -> None:
    """An invalid entry is not data, and the picture shows the number of invalid entries."""
    image = tmp_path / "a.qed"
    image.write_bytes(build_image(1 << 20, {0: b"a", 1: 1 << 50}))
    layout = layout_of(image, 64)
    assert (layout.bad, layout.data_clusters) == (1, 1)
    for form in ("picture", "svg"):
        assert main(["map", "--output", form, str(image)]) == CorruptImageError.exit_code
        output = capsys.readouterr()
        assert "1 bad entries" in output.out
        assert output.err == (
            f"qedimg: {image}: tables: found 1 invalid entries, expected offsets inside "
            "the file (see: qedimg check)\n"
        )


def test_an_invalid_entry_past_the_end_of_the_disk_is_not_counted(tmp_path: Path) -> None:
    """The list and the picture exit with 0 if no range of the disk needs the bad L1 entry."""
    image = tmp_path / "a.qed"
    image.write_bytes(build_image(1 << 20, {0: b"a"}))
    with image.open("r+b") as file:
        file.seek(CLUSTER + 8)
        file.write((1 << 50).to_bytes(8, "little"))
    assert layout_of(image, 64).bad == 0
    for form in ("human", "picture"):
        assert main(["map", "--output", form, str(image)]) == 0


def test_the_sizes_are_exact(tmp_path: Path, capsys: Captured) -> None:
    """The title of the disk has its size, even if the last cluster is incomplete."""
    image = qemu.create(tmp_path / "a.qed", CLUSTER + 1024)
    assert main(["map", "--output", "picture", str(image)]) == 0
    assert capsys.readouterr().out.startswith("disk, 65 KiB:\n")


def test_a_picture_without_colors_has_characters(tmp_path: Path, capsys: Captured) -> None:
    """Where the output is no terminal, characters show tables, data, zeros and holes."""
    image = tmp_path / "a.qed"
    qemu.create(image, 100 * CLUSTER)
    qemu.io(image, f"write -P 1 0 {10 * CLUSTER}", f"write -z {20 * CLUSTER} {5 * CLUSTER}")
    assert main(["map", "--output", "picture", str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\033" not in "".join(lines)
    title, first = lines[:2]
    assert title == "disk, 6.25 MiB:"
    assert first == "#" * 10 + "." * 10 + "0" * 5 + "." * 55
    at = next(number for number, line in enumerate(lines) if line.startswith("file, "))
    assert re.fullmatch("T+#{10}T+", lines[at + 1])
    assert "10 clusters of data in 1 runs, on average 640 KiB" in lines[at]


def test_colors_follow_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours need a terminal, and NO_COLOR or a terminal without them turns them off."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert mappicture.uses_colors(is_terminal=True)
    assert not mappicture.uses_colors(is_terminal=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not mappicture.uses_colors(is_terminal=True)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not mappicture.uses_colors(is_terminal=True)


def test_a_colored_picture_has_the_same_cells(tmp_path: Path) -> None:
    """A coloured picture has as many cells in each line as one of characters."""
    image = draw_image(tmp_path / "a.qed", random.Random(3))
    layout = layout_of(image, 200)
    plain = mappicture.picture(layout, 50, colored=False).splitlines()
    colored = mappicture.picture(layout, 50, colored=True).splitlines()
    assert len(plain) == len(colored)
    for one, other in list(zip(plain, colored, strict=True))[:-1]:
        assert len(re.sub("\033\\[[0-9;]*m", "", other)) == len(one)


def test_the_svg_has_every_cell(tmp_path: Path, capsys: Captured) -> None:
    """The SVG is a valid document, whose lines cover each cell of both parts once."""
    image = tmp_path / "<&>.qed"
    qemu.create(image, 1 << 30)
    qemu.io(image, *(f"write -P 1 {at << 20} 1M" for at in range(0, 1000, 50)))
    assert main(["map", "--output", "svg", str(image)]) == 0
    root = ET.fromstring(capsys.readouterr().out)  # noqa: S314  our own document
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title") == str(image)
    layout = layout_of(image, mappicture.SVG_COLUMNS * mappicture.SVG_ROWS)
    groups = root.findall(f"{space}g")
    for group, cells in zip(groups, (layout.disk_data, layout.data), strict=True):
        found: list[tuple[int, int]] = []
        for path in group.findall(f"{space}path"):
            for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", path.attrib["d"]):
                found += [(int(y), int(x) + at) for at in range(int(width))]
        assert sorted(found) == [divmod(at, mappicture.SVG_COLUMNS) for at in range(len(cells))]


@pytest.mark.parametrize("words", [["-s", "1M"], ["-l", "1M"], ["-f", "raw"]])
def test_a_picture_shows_a_whole_image(words: list[str], tmp_path: Path, capsys: Captured) -> None:
    """A part of the disk, or a raw file, is refused."""
    image = tmp_path / "a.qed"
    qemu.create(image, 1 << 20)
    assert main(["map", "--output", "svg", *words, str(image)]) == 1
    assert "expected a whole QED image" in capsys.readouterr().err


def test_a_raw_file_has_no_picture(tmp_path: Path, capsys: Captured) -> None:
    """A file that is no QED image is refused with its name."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    assert main(["map", "--output", "picture", str(disk)]) != 0
    error = capsys.readouterr().err
    assert str(disk) in error
    assert len(error.splitlines()) == 1
