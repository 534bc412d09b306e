"""The cases whose crash states are explored: kinds of images, and what is done to them.

To add one, append a `Case` to `CASES`, with only those fields that differ from the default.
`tests/crash/workloads.py` runs it, and `tests/crash/test_crash_states.py` explores the result.
"""

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
"""Sectors of a cluster."""
OPTIONS: Final = replace(WRITABLE, commit_seconds=1.5, needcheck_seconds=2.0)
"""Options under which tables are written back, and NEED_CHECK is cleared, during a workload."""


@dataclass(frozen=True)
class Case:
    """A kind of image, and what several tasks do to it concurrently.

    The disk is compacted automatically at each close, unless the options say otherwise.

    Attributes:
        name: The name on the command line, and part of the seed of everything random.
        table_size: The length of a table in clusters.
        table_spans: The size of the disk, as a multiple of what one L2 table covers.
        backing_depth: How many backing files the image has, one below the other.
        base_sectors: The size of the base in sectors.
        grow_bytes: How much the disk grows during the first session, in bytes.
        tail: Bytes of the file after its last whole cluster.
        autoclear: The autoclear feature bits that are set at the beginning.
        allocated: How many clusters of the disk are allocated at the beginning.
        allocated_within: At the beginning of the disk, how many clusters these are drawn from;
            0 means the whole disk.
        leaked: How many clusters of the file hold data without any reference to them.
        tasks: How many tasks use the disk concurrently.
        hot_spots: How many clusters the tasks use, with their neighbours; the fewer they are, the
            more often requests overlap.
        actions: The actions that each task draws from, one letter each, w for write, d for
            discard, z for a write of zeros, f for flush, r for read, s for sleep, D for a large
            discard.  A letter that occurs twice is drawn twice as often.
        actions_per_task: How many actions each task draws in a session.
        sessions: How often the disk is opened, used and closed.
        linger_probability: How often a call of the host takes long, before and after its effect.
        scan_delay_seconds: For how long the scan for free space is kept from reading a table.
        compacts: Whether the disk is compacted explicitly at the end of each session.
        starts_crashed: Whether the image comes from a power failure in the same case.
        options: The options with which the disk is opened.
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
        """Whether a close leaves no free cluster in the file: its compaction has no limits."""
        options = self.options
        unlimited = (options.compact_bytes, options.compact_seconds) == (
            OPTIONS.compact_bytes,
            OPTIONS.compact_seconds,
        )
        return unlimited and options.discard and options.free_list != "on"

    @property
    def size(self) -> int:
        """The size of the disk at the beginning in bytes, not a whole number of clusters."""
        span = self.table_size * CLUSTER // 8 * CLUSTER
        return int(self.table_spans * span) // CLUSTER * CLUSTER + 3 * SECTOR


_REUSE: Final = "wwwwdddzffrs"

_FREE_LIST: Final = Case(
    "",
    actions="wwddzf",
    actions_per_task=8,
    sessions=3,
    leaked=40,
    options=replace(OPTIONS, free_list="on"),
)
"""Short sessions, at whose ends a persistent free list is written."""

_LARGE_DISCARDS: Final = Case(
    "",
    table_size=4,
    table_spans=4.01,
    allocated=90,
    allocated_within=300,
    leaked=0,
    tasks=2,
    actions="wwDf",
    actions_per_task=8,
    sessions=2,
)
"""Large discards, after which tables at the end of the file can move down."""

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
    replace(_FREE_LIST, name="free list", table_size=2, tasks=2, sessions=4),
    replace(_FREE_LIST, name="free list after a crash", starts_crashed=True),
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
    replace(
        _LARGE_DISCARDS,
        name="compaction that moves tables",
        table_size=1,
        table_spans=5.1,
        allocated=120,
        compacts=True,
    ),
    replace(_LARGE_DISCARDS, name="compaction that packs tables", compacts=True),
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
    replace(_LARGE_DISCARDS, name="automatic compaction of tables"),
    Case("no discard", actions="wwdddfrs", options=replace(OPTIONS, discard=False)),
)
