"""What a cell of the comparison is: a load, a state of the image, a unit and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Stage: TypeAlias = Literal["full", "empty", "overlay", "hole", "chain"]
"""What the image is like before the load; see `benchmarks.images`."""

Unit: TypeAlias = Literal["IOPS", "MiB/s", "walks/s", "s"]

Cold: TypeAlias = Literal["mount", "host"]
"""Which caches are emptied first: the one above the server, or the host's as well."""


@dataclass(frozen=True)
class Fio:
    """A load that fio makes.

    Attributes:
        pattern: What fio calls ``rw``.
        block: Bytes of a request.
        depth: Requests in flight, of each process.
        processes: How many work at once.
        direct: With O_DIRECT, so that the kernel keeps nothing.
        fsync: After each write; otherwise once at the end, if ``fsync_at_end``.
        most: Bytes after which it ends, should the time not be over before; 0 for any.
    """

    pattern: Literal["read", "write", "randread", "randwrite", "randrw"]
    block: int
    depth: int = 1
    processes: int = 1
    direct: bool = True
    fsync: bool = False
    fsync_at_end: bool = False
    max_bytes: int = 0

    @property
    def writes(self) -> bool:
        """Whether the disk is changed."""
        return self.pattern not in {"read", "randread"}


Plain: TypeAlias = Literal["walk", "copy", "tar"]
"""Other loads: from hole to data and back with lseek; a source tree copied and synced;
that tree read with tar."""


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        name: For the command line; words between hyphens.
        title: For the table.
        unit: Of its figures; seconds are better when they are fewer.
        stage: What the image is like.
        load: What is done to it.
        peer: How many times QEMU's rate ours should be; None where nothing is asked for.
        limit: The same for the rate of the limit.
        cold: Which caches are emptied before each measurement.
        warm: The whole disk is read through the mount before the first measurement.
        loop: Through an ext4 on a loop device, whose requests go to the mount by way of
            the page cache or not.
        note: What has to be known to read the row.
    """

    name: str
    title: str
    unit: Unit
    stage: Stage
    load: Fio | Plain
    qemu_target: float | None = None
    baseline_target: float | None = None
    cold: Cold | None = None
    warm: bool = False
    loop: Literal["buffered", "direct"] | None = None
    note: str = ""

    @property
    def parallel(self) -> bool:
        """Whether the server has several requests at a time, so that threads may pay."""
        load = self.load
        if self.loop or not isinstance(load, Fio):
            return True
        return not load.direct or load.depth * load.processes > 1
