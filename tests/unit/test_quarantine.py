"""The quarantine in memory: how many batches it has, and when clusters may leave it (D5)."""

from __future__ import annotations

import pytest

from qedfuse.disk.space.epochs import Epochs
from qedfuse.disk.space.freemap import BLOCK_CLUSTERS, FreeMap
from qedfuse.disk.space.quarantine import _MAX_BATCHES, Quarantine


@pytest.fixture
def epochs() -> Epochs:
    """Return epochs without a request."""
    return Epochs()


@pytest.fixture
def quarantine(epochs: Epochs) -> Quarantine:
    """Return an empty quarantine whose blocks begin at multiples of their length."""
    return Quarantine(epochs, FreeMap())


def cycle(quarantine: Quarantine, cluster: int) -> None:
    """Put one cluster into quarantine, and make the table that dropped it durable."""
    quarantine.retire(cluster, 1)
    quarantine.cycle_began()
    quarantine.cycle_durable()


def reusable(quarantine: Quarantine) -> list[int]:
    """Take all clusters out of the quarantine that may be used again."""
    found = []
    while (taken := quarantine.pop_reusable()) is not None:
        block, bits = taken
        found += [block * BLOCK_CLUSTERS + at for at in range(BLOCK_CLUSTERS) if bits >> at & 1]
    return found


def test_batches_that_stay_do_not_become_more_and_more(
    epochs: Epochs, quarantine: Quarantine
) -> None:
    """While a request does not end, any number of cycles needs a few batches, and none is lost."""
    request = epochs.enter()
    clusters = [1000 * number for number in range(50 * _MAX_BATCHES)]
    for cluster in clusters:
        cycle(quarantine, cluster)
    assert len(quarantine._batches) == _MAX_BATCHES
    assert quarantine.count == len(clusters)
    assert reusable(quarantine) == []
    epochs.leave(request)
    assert reusable(quarantine) == clusters
    assert quarantine.count == 0


def test_a_joined_batch_waits_for_the_last_epoch(epochs: Epochs, quarantine: Quarantine) -> None:
    """The clusters of a joined batch wait for the requests of the last epoch."""
    early = epochs.enter()
    for cluster in range(_MAX_BATCHES):
        cycle(quarantine, cluster)
    late = epochs.enter()
    last = _MAX_BATCHES
    quarantine.retire(last, 1)
    quarantine.cycle_began()
    epochs.leave(early)
    quarantine.cycle_durable()
    assert reusable(quarantine) == list(range(_MAX_BATCHES - 1))
    assert reusable(quarantine) == [], "a request of the last epoch is under way"
    epochs.leave(late)
    assert reusable(quarantine) == [last - 1, last]


def test_a_joined_batch_waits_for_its_cycle_without_requests(
    epochs: Epochs, quarantine: Quarantine
) -> None:
    """A batch that was durable is not durable any more when a cycle adds clusters to it."""
    early = epochs.enter()
    for cluster in range(_MAX_BATCHES):
        cycle(quarantine, cluster)
    quarantine.retire(_MAX_BATCHES, 1)
    quarantine.cycle_began()
    epochs.leave(early)
    assert reusable(quarantine) == list(range(_MAX_BATCHES - 1))
    quarantine.cycle_durable()
    assert reusable(quarantine) == [_MAX_BATCHES - 1, _MAX_BATCHES]
