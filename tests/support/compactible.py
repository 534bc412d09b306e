"""Images with free clusters in their files, for the tests of compaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from qedfuse.check.checker import check_image
from qedfuse.hostio.imagefile import read_header
from tests.support.disks import (
    UNCOMPACTED,
    build_image,
    guest_bytes,
    inspect_image,
    opened,
    pattern,
)
from tests.support.hostfiles import MemoryFile, RecordingFile

if TYPE_CHECKING:
    import random

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import Change

CLUSTER: Final = 4096
ALLOCATED: Final = 60
"""The number of allocated clusters of `full_image`."""
DISCARDED: Final = tuple(range(0, ALLOCATED // 2, 2))
"""The clusters that `discard_some` discards: every other one of the first half."""


def full_image() -> bytearray:
    """Return an image whose clusters lie in the file in the order of the disk."""
    return build_image(100 * CLUSTER, {at: pattern(CLUSTER, at) for at in range(ALLOCATED)})


def content_after_discards(image: bytearray) -> bytes:
    """Return the content of the disk after `discard_some`."""
    left = bytearray(guest_bytes(image))
    for number in DISCARDED:
        left[number * CLUSTER : (number + 1) * CLUSTER] = bytes(CLUSTER)
    return bytes(left)


async def discard_some(disk: Disk) -> None:
    """Discard the clusters `DISCARDED`, which makes holes in the file."""
    for number in DISCARDED:
        await disk.discard(number * CLUSTER, CLUSTER)


@dataclass
class UsedImage:
    """An image that a guest has written to and discarded from in several sessions.

    Attributes:
        content: The bytes of the file.
        data: The content of each allocated guest cluster.
        pool: The guest clusters that the guest uses.
    """

    content: bytes
    data: dict[int, bytes]
    pool: list[int]

    @classmethod
    async def make(cls, choice: random.Random) -> Self:
        """Make an image of random shape, and write, discard and reopen at random."""
        data: dict[int, bytes] = {}
        pool: list[int] = []
        table_size = choice.choice((1, 2, 4, 8, 16))
        span = table_size * CLUSTER // 8
        tables = choice.randrange(1, 7)
        content = bytes(build_image(span * tables * CLUSTER, {}, table_size=table_size))
        for table in range(tables):
            offsets = choice.sample(range(min(300, span)), choice.choice((1, 5, 20)))
            pool += [table * span + offset for offset in offsets]
        for _ in range(choice.randrange(1, 4)):
            file = MemoryFile(content)
            async with opened(file, options=UNCOMPACTED) as disk:
                await disk.ensure_scanned()
                for number in choice.sample(pool, choice.randrange(len(pool) + 1)):
                    if choice.random() < 0.6:
                        data[number] = bytes([choice.randrange(1, 256)]) * CLUSTER
                        await disk.write(number * CLUSTER, data[number])
                    else:
                        data.pop(number, None)
                        await disk.discard(number * CLUSTER, CLUSTER)
                    if choice.random() < 0.05:
                        await disk.flush()
            content = bytes(file.content)
        return cls(content, data, pool)

    def assert_holds(self, content: bytes | bytearray) -> None:
        """Assert that an image holds what the guest has written."""
        found = guest_bytes(content)
        for number in self.pool:
            expected = self.data.get(number, bytes(CLUSTER))
            assert found[number * CLUSTER : (number + 1) * CLUSTER] == expected, number


async def assert_minimal(content: bytes | bytearray) -> None:
    """Assert that every cluster is referenced, by the tests' reader and by the check."""
    found = inspect_image(content)
    assert (found.errors, found.leaked) == ((), ())
    file = MemoryFile(content, writable=False)
    report = await check_image(file, await read_header(file))
    assert report.findings == ()


class LongestFile(RecordingFile):
    """A recording file that keeps the greatest length that it ever had."""

    def __init__(self, content: bytes | bytearray) -> None:
        """Begin with ``content``."""
        super().__init__(content)
        self.longest = len(content)

    def change(self, change: Change) -> None:
        """Apply a change and record it, and the length after it."""
        super().change(change)
        self.longest = max(self.longest, len(self.content))
