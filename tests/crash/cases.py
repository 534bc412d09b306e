"""The kinds of images whose crash states are explored, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tests.support.disks import WRITABLE
from tests.support.history import base_stamps, stamped
from tests.support.hostfiles import SECTOR

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions

CLUSTER: Final = 4096
PER_CLUSTER: Final = CLUSTER // SECTOR
OPTIONS: Final = replace(WRITABLE, commit_seconds=1.5, needcheck_seconds=2.0)


@dataclass(frozen=True)
class Case:
    """A kind of image and what is done to it.

    Attributes:
        spans: How much of the disk each L2 table but the last covers, in L2 tables.
        depth: How many images are below this one.
        grows: What is added to the disk half-way, in bytes.
        tail: What lies behind the last whole cluster of the file.
        held: How many clusters hold data already.
        held_in: Among how many clusters at the beginning of the disk they are; 0 for all.
        leaked: How many clusters of the file hold something and belong to nobody.
        tasks: How many do something at once.
        places: At how many places they do; fewer means that they meet more often.
        actions: What each of them does, as often as it is named here, by the initials
            of write, discard, zeros, flush, read and sleep; D is a large discard.
        rounds: How many such actions each does.
        opens: How often the disk is opened, used and closed.
        slow: How often the host takes its time over a call, before its effect and after.
        scan_after: Seconds for which the scan for free space does not get to read a table.
        compacts: Whether the disk is compacted between uses.
        crashed: Whether the same was done before, and ended in a power failure.

    All but those that say otherwise are compacted automatically when they are closed.
    """

    name: str
    table_size: int = 1
    table_spans: float = 1.1
    backing_depth: int = 0
    base_sectors: int = 0
    grow_bytes: int = 0
    tail: bytes = b""
    autoclear: int = 0
    allocated: int = 24
    allocated_within: int = 0
    leaked: int = 8
    tasks: int = 3
    hot_spots: int = 8
    actions: str = "wwwwfrs"
    actions_per_task: int = 20
    sessions: int = 1
    linger_probability: float = 0.0
    scan_delay_seconds: float = 0.0
    compacts: bool = False
    starts_crashed: bool = False
    options: OpenOptions = OPTIONS

    @property
    def leaves_no_leak(self) -> bool:
        """Whether nothing is leaked when the disk has been closed."""
        options = self.options
        unlimited = (options.compact_bytes, options.compact_seconds) == (
            OPTIONS.compact_bytes,
            OPTIONS.compact_seconds,
        )
        return unlimited and options.discard and options.free_list != "on"

    @property
    def size(self) -> int:
        """Bytes of the disk at the beginning; not a whole number of clusters."""
        span = self.table_size * CLUSTER // 8 * CLUSTER
        return int(self.table_spans * span) // CLUSTER * CLUSTER + 3 * SECTOR


_REUSE: Final = "wwwwdddzffrs"

CASES: Final = (
    Case("writes", table_size=2),
    Case("discards", actions="wwwdddzfrs"),
    Case("reuse", table_size=2, actions=_REUSE, actions_per_task=36, allocated=40, leaked=0),
    Case(
        "slow host",
        actions="wwwwddrrff",
        actions_per_task=36,
        tasks=8,
        linger_probability=0.25,
        hot_spots=1,
        allocated=9,
        leaked=0,
    ),
    Case(
        "late scan",
        actions=_REUSE,
        table_spans=2.1,
        actions_per_task=30,
        allocated=60,
        scan_delay_seconds=3.0,
    ),
    Case(
        "late scan on a slow host",
        actions="wwdddrff",
        actions_per_task=24,
        tasks=8,
        allocated=60,
        leaked=0,
        linger_probability=0.3,
        scan_delay_seconds=3.0,
    ),
    Case("base", backing_depth=1, base_sectors=5000, actions=_REUSE),
    Case(
        "chain",
        backing_depth=3,
        base_sectors=9001,
        table_size=2,
        actions=_REUSE,
        actions_per_task=24,
    ),
    Case(
        "grow",
        table_size=2,
        table_spans=0.5,
        backing_depth=1,
        base_sectors=9000,
        grow_bytes=5 << 20,
        actions="wwwdfrs",
    ),
    Case("tail", tail=stamped(base_stamps(99, 0, 5)), actions="wwwdfs"),
    Case(
        "new tables", table_spans=5.1, allocated_within=100, actions="wwwdddff", actions_per_task=30
    ),
    Case("after a crash", table_size=2, actions=_REUSE, actions_per_task=24, starts_crashed=True),
    Case(
        "base after a crash",
        backing_depth=1,
        base_sectors=5000,
        actions=_REUSE,
        starts_crashed=True,
    ),
    Case("autoclear", autoclear=0x30, actions="wwdfs", actions_per_task=12),
    Case(
        "idle",
        actions="wdsssf",
        actions_per_task=24,
        tasks=2,
        options=replace(OPTIONS, commit_seconds=9.0, needcheck_seconds=1.0),
    ),
    Case("large tables", table_size=4, table_spans=1.02, actions=_REUSE, actions_per_task=24),
    Case("small cache", actions=_REUSE, options=replace(OPTIONS, cache_bytes=0)),
    Case("zeroes", actions="wwzzzdfrs", options=replace(OPTIONS, detect_zeroes="unmap")),
    Case(
        "free list",
        table_size=2,
        actions="wwddzf",
        actions_per_task=8,
        tasks=2,
        sessions=4,
        leaked=40,
        options=replace(OPTIONS, free_list="on"),
    ),
    Case(
        "free list after a crash",
        actions="wwddzf",
        actions_per_task=8,
        sessions=3,
        starts_crashed=True,
        leaked=40,
        options=replace(OPTIONS, free_list="on"),
    ),
    Case(
        "compaction",
        actions="wwddzf",
        actions_per_task=16,
        sessions=2,
        allocated=50,
        leaked=20,
        compacts=True,
    ),
    Case(
        "compaction of large tables",
        table_size=4,
        table_spans=2.02,
        backing_depth=1,
        base_sectors=5000,
        actions="wwddf",
        actions_per_task=12,
        sessions=2,
        allocated=50,
        leaked=20,
        compacts=True,
    ),
    Case(
        "compaction at the end",
        table_size=2,
        table_spans=3.1,
        actions="wwwddf",
        actions_per_task=16,
        sessions=2,
        allocated=40,
        allocated_within=900,
        leaked=20,
        linger_probability=0.1,
        options=replace(OPTIONS, compact="full", free_list="on"),
    ),
    Case(
        "compaction that moves tables",
        table_spans=5.1,
        allocated=120,
        allocated_within=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        actions_per_task=8,
        sessions=2,
        compacts=True,
    ),
    Case(
        "compaction that packs tables",
        table_size=4,
        table_spans=4.01,
        allocated=90,
        allocated_within=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        actions_per_task=8,
        sessions=2,
        compacts=True,
    ),
    Case(
        "automatic compaction within limits",
        actions="wwddzf",
        actions_per_task=12,
        sessions=4,
        allocated=60,
        leaked=20,
        options=replace(OPTIONS, compact_bytes=3 * CLUSTER),
    ),
    Case(
        "automatic compaction on a slow host",
        table_size=2,
        table_spans=3.1,
        actions="wwdDf",
        actions_per_task=8,
        sessions=3,
        allocated=80,
        allocated_within=300,
        linger_probability=0.2,
        options=replace(OPTIONS, compact_seconds=4.0),
    ),
    Case(
        "automatic compaction of tables",
        table_size=4,
        table_spans=4.01,
        allocated=90,
        allocated_within=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        actions_per_task=8,
        sessions=2,
    ),
    Case("no discard", actions="wwdddfrs", options=replace(OPTIONS, discard=False)),
)
