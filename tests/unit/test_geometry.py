"""The arithmetic on offsets, for every legal geometry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.ondisk.constants import MAX_OFFSET, SECTOR
from qedfuse.ondisk.geometry import Geometry

CLUSTER_SIZES = [1 << bits for bits in range(12, 27)]
TABLE_SIZES = [1, 2, 4, 8, 16]

geometries = st.builds(Geometry, st.sampled_from(CLUSTER_SIZES), st.sampled_from(TABLE_SIZES))
offsets = st.integers(0, MAX_OFFSET)


def test_default_geometry() -> None:
    """The default is QEMU's: 64 KiB clusters, tables of four, 64 TiB at most."""
    geometry = Geometry(64 << 10, 4)
    assert geometry.cluster_bits == 16
    assert geometry.table_bytes == 256 << 10
    assert geometry.entries == 32 << 10
    assert geometry.table_span == 2 << 30
    assert geometry.max_image_size == 64 << 40


@pytest.mark.parametrize("table_size", TABLE_SIZES)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_largest_image_fits_tables_and_kernel(cluster_size: int, table_size: int) -> None:
    """The largest disk is whole sectors, addressable, and below 2**63 bytes."""
    geometry = Geometry(cluster_size, table_size)
    largest = geometry.max_image_size
    assert largest % SECTOR == 0
    assert 0 < largest <= MAX_OFFSET
    assert geometry.l1_used(largest) <= geometry.entries
    addressable = geometry.entries**2 * cluster_size
    assert largest == addressable or addressable > MAX_OFFSET - SECTOR


@given(geometries, offsets)
def test_indices_take_an_offset_apart(geometry: Geometry, offset: int) -> None:
    """The two table indices and the rest of an offset give the offset again."""
    l1 = geometry.l1_index(offset)
    l2 = geometry.l2_index(offset)
    rest = geometry.in_cluster(offset)
    assert 0 <= l2 < geometry.entries
    assert 0 <= rest < geometry.cluster_size
    assert l1 * geometry.table_span + l2 * geometry.cluster_size + rest == offset


@given(geometries, offsets)
def test_rounding(geometry: Geometry, offset: int) -> None:
    """Rounding down and up gives the cluster boundaries next to an offset."""
    size = geometry.cluster_size
    down, up = geometry.floor(offset), geometry.ceil(offset)
    assert down % size == up % size == 0
    assert down <= offset <= up
    assert up - down == (size if offset % size else 0)
    assert geometry.clusters(offset) * size == up
    assert down + geometry.in_cluster(offset) == offset


@given(geometries, offsets)
def test_used_l1_entries_cover_the_disk(geometry: Geometry, size: int) -> None:
    """The number of used L1 entries is the smallest that covers the disk."""
    used = geometry.l1_used(size)
    assert used * geometry.table_span >= size
    assert max(0, used - 1) * geometry.table_span <= size
    assert used == (geometry.l1_index(size - 1) + 1 if size else 0)


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        (0, 4096 + 4096),
        (512, 4096 + 2 * 4096 + 4096),
        (2 << 20, 4096 + 2 * 4096 + (2 << 20)),
        ((2 << 20) + 512, 4096 + 3 * 4096 + (2 << 20) + 4096),
    ],
)
def test_bound(image_size: int, expected: int) -> None:
    """The bound is the header, the L1 table, all L2 tables and one cluster per guest cluster."""
    assert Geometry(4096, 1).bound(4096, image_size) == expected
