"""The marks of the scan: changes of clusters and of tables while the scan is running."""

from __future__ import annotations

import numpy as np
import pytest

from qedfuse.disk.space.freemap import FreeMap
from qedfuse.disk.space.marking import Marking
from qedfuse.errors import NeedsCheckError

CLUSTERS = 100
TABLE, NEXT_TABLE = 4096, 8192
"""File offsets of two slices; the scan marks the first of them first."""


@pytest.fixture
def marking() -> Marking:
    """Record the changes of a file of 100 clusters, before any slice is marked."""
    marking = Marking(FreeMap(), "image")
    marking.begin(CLUSTERS)
    marking.restart()
    return marking


def refer_to(*clusters: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Make the entries of a slice."""
    return np.array(clusters, np.uint64)


def test_marked_clusters_have_an_owner(marking: Marking) -> None:
    """What a slice refers to is owned, and nothing else is; later clusters are ignored."""
    marking.mark(TABLE, refer_to(3, 5, CLUSTERS + 1))
    assert marking.owners.owned(0, CLUSTERS + 2) == 1 << 3 | 1 << 5
    assert marking.duplicates == 0


def test_a_second_reference_is_a_duplicate(marking: Marking) -> None:
    """Two entries that refer to one cluster are counted."""
    marking.mark(TABLE, refer_to(3, 5))
    marking.mark(NEXT_TABLE, refer_to(5))
    assert marking.duplicates == 1


def test_changes_are_recorded_only_during_a_scan(marking: Marking) -> None:
    """A cluster that changes its state before `begin` or after `end` is not recorded."""
    marking.record_change(7, 2)
    marking.end()
    marking.record_change(20, 1)
    marking.record_drop(30, 1, TABLE)
    assert list(marking.changed.runs()) == [(7, 2)]


def test_a_dropped_cluster_is_recorded_as_changed(marking: Marking) -> None:
    """The scan must not take it for free: it is in quarantine."""
    marking.record_drop(5, 1, TABLE)
    assert marking.changed.count_free(5, 1) == 1


@pytest.mark.parametrize("marked_before", [False, True])
def test_one_owner_drops_its_cluster(marking: Marking, *, marked_before: bool) -> None:
    """The only reference to a cluster makes no duplicate, whether it was marked or not."""
    if marked_before:
        marking.mark(TABLE, refer_to(5))
    marking.record_drop(5, 1, TABLE)
    if not marked_before:
        marking.mark(TABLE, refer_to())
    assert marking.duplicates == 0
    assert marking.owners.owned(5, 1) == 1


def test_a_drop_does_not_hide_a_second_owner(marking: Marking) -> None:
    """A slice that is marked later does not show what it has dropped, but it was an owner."""
    marking.mark(TABLE, refer_to(5))
    marking.record_drop(5, 1, NEXT_TABLE)
    assert marking.duplicates == 1


def test_two_drops_of_one_cluster_are_two_owners(marking: Marking) -> None:
    """Neither of them may have been marked."""
    marking.record_drop(5, 1, TABLE)
    marking.record_drop(5, 1, NEXT_TABLE)
    assert marking.duplicates == 1


@pytest.mark.parametrize("restarts", [0, 1, 2])
@pytest.mark.parametrize("dropped", [1, 2, 3])
@pytest.mark.parametrize("marked", range(4))
def test_each_reference_beyond_the_first_counts_once(
    marking: Marking, marked: int, dropped: int, restarts: int
) -> None:
    """Three references to a cluster are two duplicates, however they are found.

    The first ``marked`` slices are marked before the first ``dropped`` references are dropped; the
    walk then goes on, or begins again.
    """
    slices = [4096 * (number + 1) for number in range(3)]
    for offset in slices[:marked]:
        marking.mark(offset, refer_to(5))
    for offset in slices[:dropped]:
        marking.record_drop(5, 1, offset)
    for _ in range(restarts):
        marking.restart()
    for number, offset in enumerate(slices):
        if restarts or number >= marked:
            marking.mark(offset, refer_to(5) if number >= dropped else refer_to())
    assert marking.duplicates == 2


def test_a_restart_counts_no_duplicate_twice(marking: Marking) -> None:
    """After a restart the walk finds the same duplicates again, and they count once."""
    marking.record_drop(5, 1, TABLE)
    marking.record_drop(5, 1, NEXT_TABLE)
    for _ in range(3):
        marking.restart()
        marking.mark(TABLE, refer_to(3, 3))
        assert marking.duplicates == 2


def test_a_restart_keeps_what_was_dropped(marking: Marking) -> None:
    """A walk that starts again still finds the other owner of a dropped cluster."""
    marking.mark(TABLE, refer_to(6))
    marking.record_drop(5, 1, TABLE)
    marking.restart()
    assert marking.owners.owned(0, 10) == 1 << 5
    marking.mark(TABLE, refer_to(5))
    assert marking.duplicates == 1


def test_a_drop_that_exceeds_the_limit_makes_the_marks_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A drop raises no error; after a restart the marks are complete if the limit allows it."""
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_BITMAP_CLUSTERS", 0)
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_LISTED_CLUSTERS", 3)
    marking = Marking(FreeMap(), "image")
    marking.begin(CLUSTERS)
    marking.restart()
    marking.mark(TABLE, refer_to(3, 5))
    marking.require_complete()
    marking.record_drop(10, 2, NEXT_TABLE)
    assert list(marking.changed.runs()) == [(10, 2)]
    with pytest.raises(NeedsCheckError, match="found more than 3 references"):
        marking.require_complete()
    marking.restart()
    marking.require_complete()
    assert marking.owners.owned(0, CLUSTERS) == 0b11 << 10


def test_a_slice_that_exceeds_the_limit_makes_the_marks_incomplete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Marking raises no error, so that the walk can go on; later slices are not marked."""
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_BITMAP_CLUSTERS", 0)
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_LISTED_CLUSTERS", 2)
    marking = Marking(FreeMap(), "image")
    marking.begin(CLUSTERS)
    marking.restart()
    marking.mark(TABLE, refer_to(3, 5, 6))
    marking.mark(NEXT_TABLE, refer_to(8))
    assert marking.owners.owned(0, CLUSTERS) == 0
    with pytest.raises(NeedsCheckError, match="found more than 2 references"):
        marking.require_complete()
