"""The file never exceeds its bound, whatever a guest and crashes do together.

Tests the allocation alone, so that many lives of an image fit into a second.  A guest that
knows how the allocator works writes, discards and allocates tables; a crash restores the
tables of the last flush, and the clusters that were handed out since are free again.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import pytest

from qedfuse.ondisk.header import Header
from tests.support.hostfiles import MemoryFile
from tests.support.share import share
from tests.support.space import make_space

CLUSTER: Final = 4096


class SparseFile(MemoryFile):
    """A file that has a length and no content."""

    length = 0

    def size(self) -> int:
        """Return the length in bytes."""
        return self.length

    async def truncate(self, size: int) -> None:
        """Set the length in bytes."""
        self.length = size


class Image:
    """The owners of clusters by the tables in memory, and by the durable tables.

    Attributes:
        bound: The bound of the file's length, in bytes.
        tables: The first cluster of each table, by its index.
        data: The cluster in the file of each allocated guest cluster.
        durable: Both as of the last commit.
        lost_tables: How many tables were lost in crashes.
    """

    def __init__(self, choice: random.Random, table_size: int, tables: int, span: int) -> None:
        """Make an empty image of ``tables`` tables with ``span`` guest clusters each."""
        self.choice = choice
        # The geometry of the disk does not matter here, only how much it may need.
        header = Header(CLUSTER, table_size, choice.randrange(1, 4), 0, 0, 0, 0, 0)
        self.header = replace(header, l1_table_offset=header.header_end)
        self.count, self.span = tables, span
        self.guests = list(range(tables * span))
        self.request = choice.choice((1, 2, 7, 50))
        self.bound = self.header.l1_end + tables * (table_size + span) * CLUSTER
        self.tables: dict[int, int] = {}
        self.data: dict[int, int] = {}
        self.lost_tables = 0
        self.commit()
        self.file = SparseFile()
        self.file.length = self.header.l1_end
        self.open()

    def open(self) -> None:
        """Open the image, and find its free clusters without a scan."""
        space = make_space(
            self.file, self.header, self.bound, lambda: self.count - len(self.tables)
        )
        self.allocator, self.manager = space.allocator, space.manager
        allocator = space.allocator
        used = set(self.data.values())
        for table in self.tables.values():
            used |= set(range(table, table + self.header.table_size))
        for cluster in range(self.header.l1_end // CLUSTER, allocator.end // CLUSTER):
            if cluster not in used:
                allocator.free_run(cluster, 1)
        allocator.lower_end()

    async def write(self, *guests: int) -> None:
        """Write to guest clusters, in requests of several clusters."""
        new = [guest for guest in guests if guest not in self.data]
        while new:
            request, new = new[: self.request], new[self.request :]
            for index in {guest // self.span for guest in request} - self.tables.keys():
                table = await self.manager.allocate_table()
                self.tables[index] = table.offset // CLUSTER
            while request:
                run = await self.manager.allocate(len(request))
                for cluster in range(run.offset // CLUSTER, run.end // CLUSTER):
                    assert cluster not in self.data.values()
                    self.data[request.pop()] = cluster

    def discard(self, guests: list[int]) -> None:
        """Discard guest clusters, commit, and end their quarantine."""
        runs = [self.data.pop(guest) for guest in guests]
        self.commit()
        for cluster in runs:
            self.allocator.free_run(cluster, 1)
        self.allocator.lower_end()

    def commit(self) -> None:
        """Make the tables durable."""
        self.durable = (dict(self.tables), dict(self.data))

    def crash(self, keep: float) -> None:
        """Lose what is not durable, except for a share ``keep`` of it, and open the image again."""
        tables, data = self.durable
        for index, table in self.tables.items():
            if self.choice.random() < keep:
                tables[index] = table
        for guest, cluster in self.data.items():
            if guest // self.span in tables and self.choice.random() < keep:
                data[guest] = cluster
        self.lost_tables += len(self.tables.keys() - tables.keys())
        self.tables, self.data = tables, data
        self.commit()
        self.open()

    async def step(self) -> None:
        """Write, discard, commit or crash at random."""
        choice, guests = self.choice, self.guests
        choice.shuffle(guests)
        match choice.randrange(8):
            case 0 | 1:
                await self.write(*guests[: choice.choice((1, 3, len(guests)))])
            case 2:
                # Every other cluster of the file: only single free clusters are left.
                by_offset = sorted(self.data, key=self.data.__getitem__)
                self.discard(by_offset[choice.randrange(2) :: 2])
            case 3:
                self.discard([guest for guest in self.data if choice.random() < 0.3])
            case 4:
                self.commit()
            case 5:
                await self.write(*(at for at in guests if at // self.span in self.tables))
            case 6:
                new = (index for index in range(self.count) if index not in self.tables)
                await self.write(*(at * self.span for at in new if choice.random() < 0.7))
                self.crash(keep=0)
            case _:
                self.crash(keep=choice.choice((0, 0.5, 1)))


@pytest.mark.parametrize("first_seed", range(0, share(150, of=400), 50))
@pytest.mark.parametrize("small_blocks", [False, True])
async def test_no_guest_and_no_crash_takes_the_file_past_its_bound(
    first_seed: int, monkeypatch: pytest.MonkeyPatch, *, small_blocks: bool
) -> None:
    """Filling, discarding every other cluster, and losing tables keep the file in its bound."""
    if small_blocks:
        # Small blocks, so that these small images have borders between blocks.
        monkeypatch.setattr("qedfuse.disk.space.freemap.BLOCK_CLUSTERS", 32)
        monkeypatch.setattr("qedfuse.disk.space.allocator.BLOCK_CLUSTERS", 32)
    lost_tables = at_bound = 0
    for seed in range(first_seed + small_blocks, first_seed + 50, 2):
        choice = random.Random(seed)
        table_size = choice.choice((1, 2, 4, 16))
        image = Image(choice, table_size, choice.randrange(1, 9), choice.randrange(1, 20))
        for _ in range(100):
            await image.step()
            at_bound += image.file.length == image.bound
            assert image.file.length <= image.bound, seed
            assert image.allocator.end <= image.file.length, seed
        await image.write(*image.guests)
        assert image.file.length <= image.bound, seed
        lost_tables += image.lost_tables
    assert lost_tables, "no crash lost a table"
    assert at_bound > 2_000, "of 2,500 steps nearly all are with a file at its bound"
