"""The images and the models of the long measurements, without a server and a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import scale, soak
from benchmarks.probe import stamp
from benchmarks.sparse import AREA_CLUSTERS, GEOMETRY, build, choose
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.tools.repair.imagecheck import check

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = GEOMETRY.cluster_size
MIB = 1 << 20


@pytest.mark.parametrize(
    ("disk", "wanted"),
    [
        pytest.param(1 << 30, 1000, id="few, anywhere"),
        pytest.param(16384, 16000, id="nearly full"),
        pytest.param(1000, 1000, id="full, with a short area at the end"),
        pytest.param(1000, 1, id="a single one"),
    ],
)
def test_chosen_clusters_are_different_ones_of_the_disk(disk: int, wanted: int) -> None:
    """Chosen clusters are as many as asked for, ascending, distinct, and on the disk."""
    clusters = choose(disk, wanted, np.random.default_rng(1))
    assert len(clusters) == wanted
    assert (np.diff(clusters) > 0).all()
    assert clusters[0] >= 0
    assert clusters[-1] < disk


def test_areas_are_half_full() -> None:
    """In each area half of the clusters are chosen, with holes between them."""
    clusters = choose(1 << 26, 256 * 40, np.random.default_rng(1))
    areas = np.unique(clusters // AREA_CLUSTERS)
    assert len(areas) == 40
    assert areas[-1] - areas[0] > 1000


def test_no_more_clusters_than_there_are() -> None:
    """A disk with too few clusters is refused."""
    with pytest.raises(ValueError, match="found 11, expected at most 10"):
        choose(10, 11, np.random.default_rng(1))


async def test_image_holds_each_cluster_where_it_is_said_to(tmp_path: Path) -> None:
    """The library finds exactly the allocated clusters, at the offsets that the model has."""
    path = tmp_path / "sparse.qed"
    clusters, offsets = build(path, 1 << 40, 700)
    places = dict(zip(clusters.tolist(), offsets.tolist(), strict=True))
    found = {}
    async with open_disk(str(path)) as disk:
        assert disk.size == 1 << 40
        for extent in await disk.extents(0, disk.size):
            assert extent.kind in {Kind.DATA, Kind.UNALLOCATED}
            if extent.kind is Kind.DATA:
                for step in range(0, extent.length, CLUSTER):
                    found[(extent.start + step) // CLUSTER] = extent.file_offset + step
    assert found == places


async def test_image_is_sound_and_small(tmp_path: Path) -> None:
    """The image has no errors and no leaks, and occupies little more than its tables."""
    path = tmp_path / "sparse.qed"
    clusters, _offsets = build(path, 1 << 46, 3000)
    assert not (await check(str(path))).before.counts
    assert path.stat().st_size > 3000 * CLUSTER
    areas = len(np.unique(clusters // AREA_CLUSTERS))
    # The L1 table is written whole; an L2 table only where there are entries.
    assert path.stat().st_blocks * 512 <= areas * 4096 + GEOMETRY.table_bytes + 16 * 4096


def test_original_is_read_where_it_was_stamped(tmp_path: Path) -> None:
    """Each load reads allocated clusters, and "near" reads adjacent ones."""
    original = scale.Original(scale.Cell("1T", 2000), tmp_path)
    clusters, offsets = build(tmp_path / "again.qed", 1 << 40, 2000)
    places = dict(zip(clusters.tolist(), offsets.tolist(), strict=True))
    content = original.path.open("rb")
    with content:
        for load in ("near", "anywhere"):
            for place in original.offsets(load).tolist():
                content.seek(places[place // CLUSTER] + place % CLUSTER)
                assert content.read(16) == stamp(place)
    near = original.offsets("near")
    assert near.max() - near.min() < scale.NEAR_BYTES
    assert len(original.offsets("write")) == scale.WRITE_COUNT


def test_flat_columns_differ_from_others() -> None:
    """A column is flat up to a factor of two."""
    row = dict.fromkeys(scale.COLUMNS, 1.0)
    results = {
        scale.Cell("1G", 10**4): row,
        scale.Cell("1T", 10**7): {**row, "start": 2.0, "scan": 2.1},
    }
    text = scale.markdown(results, dict.fromkeys(results, 1))
    flat, others = text.splitlines()[-2:]
    assert "start, s" in flat
    assert "scan, s" not in flat
    assert others == "Not flat, and by what factor: scan, s (2.1)."
    assert "| 1T | 10^7 | 1 | 2 |" in text


def test_only_cells_that_fit_are_measured() -> None:
    """A disk of 1 GiB has 16,384 clusters, and only cells up to that are measured."""
    assert scale.Cell("1G", 16384).fits
    assert not scale.Cell("1G", 16385).fits


def test_model_distinguishes_writes() -> None:
    """The content of a block identifies the block and the write."""
    model = soak.Model(100, 8)
    assert model.expected(100, 8) == bytes(8 * soak.BLOCK_BYTES)
    first = model.write(102, 2)
    second = model.write(103, 2)
    assert first[: soak.BLOCK_BYTES] + second == model.expected(102, 3)
    assert first[soak.BLOCK_BYTES :] != second[: soak.BLOCK_BYTES]
    assert first[: soak.BLOCK_BYTES] != model.write(102, 1)
    model.discard(103, 1)
    assert model.expected(103, 1) == bytes(soak.BLOCK_BYTES)
    assert model.expected(104, 1) == second[soak.BLOCK_BYTES :]


def samples(*resident_mib: float) -> list[soak.Sample]:
    """Return what was seen, a sample a minute."""
    return [
        soak.Sample(60.0 * minute, int(mib * MIB), 11, 3, minute * MIB, 0)
        for minute, mib in enumerate(resident_mib)
    ]


def test_growth_counts_from_the_second_minute() -> None:
    """Growth is counted from the second minute on, or from the middle of a short run."""
    assert soak.growth(samples(40, 60, 70, 70, 69, 71)) == MIB
    assert soak.growth(samples(40, 60, 70, 70, 69, 79)) == 9 * MIB
    assert soak.growth(samples(40, 60, 61)) == MIB


def test_slopes_are_of_the_second_half() -> None:
    """A slope covers the second half of a run, in units per minute."""
    by = soak.slopes(samples(0, 50, 60, 61, 62, 63, 64))
    assert by["resident"] == pytest.approx(MIB)
    assert by["length"] == pytest.approx(MIB)
    assert by["descriptors"] == pytest.approx(0, abs=1e-6)
