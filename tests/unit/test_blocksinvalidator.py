"""The kernel's ``st_blocks`` of a disk after flushes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import trio

from qedfuse.errors import HostError
from qedfuse.mount.fuse.blocksinvalidator import MIN_INTERVAL_SECONDS, BlocksInvalidator
from qedfuse.mount.fuse.exporteddisk import ExportedDisk

if TYPE_CHECKING:
    from qedfuse.disk import disk


class Disk:
    """A disk that counts how often its blocks are looked up.

    Attributes:
        blocks: The blocks; None if the host refuses.
        lookups: The number of lookups.
    """

    def __init__(self) -> None:
        """Take up eight blocks."""
        self.blocks: int | None = 8
        self.lookups = 0

    def stored_blocks(self) -> int:
        """Return the blocks."""
        self.lookups += 1
        if self.blocks is None:
            msg = "disk: stat: no"
            raise HostError(msg)
        return self.blocks


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the inodes whose attributes the kernel has to forget."""
    inodes: list[int] = []
    monkeypatch.setattr("pyfuse3.invalidate_inode", lambda inode, **_how: inodes.append(inode))
    return inodes


def export(stored: Disk, blocks: int) -> ExportedDisk:
    """Export a disk of which the kernel has cached some blocks."""
    return ExportedDisk(cast("disk.Disk", stored), b"vm.raw", 2, cached_blocks=blocks)


@pytest.mark.parametrize(("cached", "is_wrong"), [(8, False), (16, True), (-1, False)])
def test_only_a_wrong_value_that_the_kernel_has_is_invalidated(
    cached: int, forgotten: list[int], *, is_wrong: bool
) -> None:
    """After a flush the kernel forgets ``st_blocks`` if it has cached another value."""
    exported = export(Disk(), cached)
    BlocksInvalidator(lambda: [exported]).flushed()
    assert forgotten == [2] * is_wrong
    assert exported.cached_blocks == (-1 if is_wrong else cached)


def test_if_the_host_refuses_the_kernel_keeps_its_value(forgotten: list[int]) -> None:
    """A flush does not fail because the blocks cannot be looked up."""
    disk = Disk()
    disk.blocks = None
    exported = export(disk, 16)
    BlocksInvalidator(lambda: [exported]).flushed()
    assert (forgotten, exported.cached_blocks) == ([], 16)


async def test_flushes_in_quick_succession_cost_one_check_each_interval(
    forgotten: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    """Of many flushes only some look up the blocks, and the last change is noticed all the same."""
    assert autojump_clock.autojump_threshold == 0
    disk = Disk()
    exported = export(disk, 8)
    invalidator = BlocksInvalidator(lambda: [exported], trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(invalidator.run)
        for _ in range(1000):
            invalidator.flushed()
            await trio.sleep(MIN_INTERVAL_SECONDS / 100)
        disk.blocks = 16
        invalidator.flushed()
        assert forgotten == []
        assert disk.lookups <= 21, "at most two in each of the ten intervals"
        await trio.sleep(2 * MIN_INTERVAL_SECONDS)
        assert forgotten == [2]
        lookups = disk.lookups
        await trio.sleep(100)
        assert disk.lookups == lookups, "nothing is looked up without a flush"
        nursery.cancel_scope.cancel()
