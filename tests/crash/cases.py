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
    spans: float = 1.1
    depth: int = 0
    base_sectors: int = 0
    grows: int = 0
    tail: bytes = b""
    autoclear: int = 0
    held: int = 24
    held_in: int = 0
    leaked: int = 8
    tasks: int = 3
    places: int = 8
    actions: str = "wwwwfrs"
    rounds: int = 20
    opens: int = 1
    slow: float = 0.0
    scan_after: float = 0.0
    compacts: bool = False
    crashed: bool = False
    options: OpenOptions = OPTIONS

    @property
    def tidy(self) -> bool:
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
        return int(self.spans * span) // CLUSTER * CLUSTER + 3 * SECTOR


_REUSE: Final = "wwwwdddzffrs"

CASES: Final = (
    Case("writes", table_size=2),
    Case("discards", actions="wwwdddzfrs"),
    Case("reuse", table_size=2, actions=_REUSE, rounds=36, held=40, leaked=0),
    Case(
        "slow host", actions="wwwwddrrff", rounds=36, tasks=8, slow=0.25, places=1, held=9, leaked=0
    ),
    Case("late scan", actions=_REUSE, spans=2.1, rounds=30, held=60, scan_after=3.0),
    Case(
        "late scan on a slow host",
        actions="wwdddrff",
        rounds=24,
        tasks=8,
        held=60,
        leaked=0,
        slow=0.3,
        scan_after=3.0,
    ),
    Case("base", depth=1, base_sectors=5000, actions=_REUSE),
    Case("chain", depth=3, base_sectors=9001, table_size=2, actions=_REUSE, rounds=24),
    Case(
        "grow",
        table_size=2,
        spans=0.5,
        depth=1,
        base_sectors=9000,
        grows=5 << 20,
        actions="wwwdfrs",
    ),
    Case("tail", tail=stamped(base_stamps(99, 0, 5)), actions="wwwdfs"),
    Case("new tables", spans=5.1, held_in=100, actions="wwwdddff", rounds=30),
    Case("after a crash", table_size=2, actions=_REUSE, rounds=24, crashed=True),
    Case("base after a crash", depth=1, base_sectors=5000, actions=_REUSE, crashed=True),
    Case("autoclear", autoclear=0x30, actions="wwdfs", rounds=12),
    Case(
        "idle",
        actions="wdsssf",
        rounds=24,
        tasks=2,
        options=replace(OPTIONS, commit_seconds=9.0, needcheck_seconds=1.0),
    ),
    Case("large tables", table_size=4, spans=1.02, actions=_REUSE, rounds=24),
    Case("small cache", actions=_REUSE, options=replace(OPTIONS, cache_bytes=0)),
    Case("zeroes", actions="wwzzzdfrs", options=replace(OPTIONS, detect_zeroes="unmap")),
    Case(
        "free list",
        table_size=2,
        actions="wwddzf",
        rounds=8,
        tasks=2,
        opens=4,
        leaked=40,
        options=replace(OPTIONS, free_list="on"),
    ),
    Case(
        "free list after a crash",
        actions="wwddzf",
        rounds=8,
        opens=3,
        crashed=True,
        leaked=40,
        options=replace(OPTIONS, free_list="on"),
    ),
    Case("compaction", actions="wwddzf", rounds=16, opens=2, held=50, leaked=20, compacts=True),
    Case(
        "compaction of large tables",
        table_size=4,
        spans=2.02,
        depth=1,
        base_sectors=5000,
        actions="wwddf",
        rounds=12,
        opens=2,
        held=50,
        leaked=20,
        compacts=True,
    ),
    Case(
        "compaction at the end",
        table_size=2,
        spans=3.1,
        actions="wwwddf",
        rounds=16,
        opens=2,
        held=40,
        held_in=900,
        leaked=20,
        slow=0.1,
        options=replace(OPTIONS, compact="full", free_list="on"),
    ),
    Case(
        "compaction that moves tables",
        spans=5.1,
        held=120,
        held_in=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        rounds=8,
        opens=2,
        compacts=True,
    ),
    Case(
        "compaction that packs tables",
        table_size=4,
        spans=4.01,
        held=90,
        held_in=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        rounds=8,
        opens=2,
        compacts=True,
    ),
    Case(
        "automatic compaction within limits",
        actions="wwddzf",
        rounds=12,
        opens=4,
        held=60,
        leaked=20,
        options=replace(OPTIONS, compact_bytes=3 * CLUSTER),
    ),
    Case(
        "automatic compaction on a slow host",
        table_size=2,
        spans=3.1,
        actions="wwdDf",
        rounds=8,
        opens=3,
        held=80,
        held_in=300,
        slow=0.2,
        options=replace(OPTIONS, compact_seconds=4.0),
    ),
    Case(
        "automatic compaction of tables",
        table_size=4,
        spans=4.01,
        held=90,
        held_in=300,
        leaked=0,
        tasks=2,
        actions="wwDf",
        rounds=8,
        opens=2,
    ),
    Case("no discard", actions="wwdddfrs", options=replace(OPTIONS, discard=False)),
)
