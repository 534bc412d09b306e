"""The cells that are measured, and their target ratios."""

from __future__ import annotations

import re
from typing import Final, Literal

from benchmarks.cells import KIB, MIB, Cell, Fio

RANDOM_READ_16: Final = Fio("randread", 4 * KIB, depth=16)
RANDOM_WRITE_16: Final = Fio("randwrite", 4 * KIB, depth=16)
CAT_BYTES: Final = 128 * KIB
"""The size of a read of cat(1) and cp(1)."""

_NO_CACHE: Final = "QEMU's mount has no page cache, every read goes to the server"
_FLAT: Final = "the baseline has no base to copy from"


def _loop_cells() -> list[Cell]:
    """Return the cells with a loop device: three loads, buffered and with direct I/O."""
    cells = []
    random = Fio("randrw", 4 * KIB, depth=16)
    kinds: tuple[Literal["buffered", "direct"], ...] = ("buffered", "direct")
    for kind in kinds:
        name = "loop" if kind == "buffered" else "loopdio"
        what = "ext4 on losetup" + (" --direct-io=on" if kind == "direct" else "")
        cells += [
            Cell(
                f"{name}-copy",
                f"{what}: copy a source tree and sync",
                "s",
                "empty",
                "copy",
                1.2,
                loop=kind,
            ),
            Cell(f"{name}-tar", f"{what}: tar it cold", "s", "empty", "tar", 1.2, loop=kind),
            Cell(
                f"{name}-rand-4k",
                f"{what}: 4 KiB random, half writes, 16 in flight",
                "IOPS",
                "empty",
                random,
                1.2,
                loop=kind,
            ),
        ]
    return cells


CELLS: Final = (
    Cell(
        "randread-4k-1",
        "4 KiB random read, O_DIRECT, 1 in flight",
        "IOPS",
        "full",
        Fio("randread", 4 * KIB),
        4,
    ),
    Cell(
        "randread-4k-16",
        "4 KiB random read, O_DIRECT, 16 in flight",
        "IOPS",
        "full",
        RANDOM_READ_16,
        2,
        0.4,
    ),
    Cell(
        "randread-4k-4procs",
        "4 KiB random read, O_DIRECT, 4 processes",
        "IOPS",
        "full",
        Fio("randread", 4 * KIB, processes=4),
        2,
    ),
    Cell(
        "overwrite-4k-1",
        "4 KiB random overwrite, O_DIRECT, 1 in flight",
        "IOPS",
        "full",
        Fio("randwrite", 4 * KIB),
        2,
    ),
    Cell(
        "overwrite-4k-16",
        "4 KiB random overwrite, O_DIRECT, 16 in flight",
        "IOPS",
        "full",
        RANDOM_WRITE_16,
        1.5,
        0.4,
    ),
    Cell(
        "randread-64k-4",
        "64 KiB random read, O_DIRECT, 4 in flight",
        "IOPS",
        "full",
        Fio("randread", 64 * KIB, depth=4),
        2,
    ),
    Cell("read-1m", "1 MiB sequential read, O_DIRECT", "MiB/s", "full", Fio("read", MIB), 2.5, 0.8),
    Cell(
        "overwrite-1m",
        "1 MiB sequential overwrite, O_DIRECT",
        "MiB/s",
        "full",
        Fio("write", MIB),
        1.2,
        0.8,
    ),
    Cell(
        "new-write-1m",
        "1 MiB sequential write into a new image, O_DIRECT, fsync at the end",
        "MiB/s",
        "empty",
        Fio("write", MIB, fsync_at_end=True, max_bytes=512 * MIB),
        1.5,
        0.8,
        note="dominated by the host's disk",
    ),
    Cell(
        "new-write-4k-16",
        "4 KiB random write into a new image, O_DIRECT, 16 in flight",
        "IOPS",
        "empty",
        RANDOM_WRITE_16,
        3,
        0.4,
    ),
    Cell(
        "cow-write-4k-16",
        "4 KiB random write over a backing file, O_DIRECT, 16 in flight",
        "IOPS",
        "overlay",
        RANDOM_WRITE_16,
        2,
        0.4,
        note=_FLAT,
    ),
    Cell(
        "buffered-read-cold",
        "buffered sequential read, cold",
        "MiB/s",
        "full",
        Fio("read", CAT_BYTES, direct=False, max_bytes=1024 * MIB),
        2,
        cold="mount",
        note="the mount's page cache is empty, the image is in the host's; " + _NO_CACHE,
    ),
    Cell(
        "buffered-read-coldhost",
        "buffered sequential read, the host's cache cold too",
        "MiB/s",
        "full",
        Fio("read", CAT_BYTES, direct=False, max_bytes=1024 * MIB),
        cold="host",
    ),
    Cell(
        "buffered-read-warm",
        "buffered sequential read, warm",
        "MiB/s",
        "full",
        Fio("read", CAT_BYTES, direct=False),
        10,
        warm=True,
        note=_NO_CACHE,
    ),
    Cell(
        "buffered-write-4k",
        "buffered 4 KiB sequential write, fsync at the end",
        "MiB/s",
        "full",
        Fio("write", 4 * KIB, direct=False, fsync_at_end=True, max_bytes=256 * MIB),
        20,
    ),
    Cell(
        "fsync-write-4k",
        "4 KiB random write, O_DIRECT, fsync after each",
        "IOPS",
        "full",
        Fio("randwrite", 4 * KIB, fsync=True),
        1.5,
    ),
    Cell(
        "hole-seek",
        "10 GiB of hole: SEEK_DATA and SEEK_HOLE from end to end",
        "walks/s",
        "hole",
        "walk",
        2,
        note="all systems implement lseek; one cluster of data ends the hole",
    ),
    Cell(
        "hole-read",
        "10 GiB of hole: plain buffered read",
        "MiB/s",
        "hole",
        Fio("read", CAT_BYTES, direct=False, max_bytes=10240 * MIB),
        2,
        cold="mount",
        note=f"{_NO_CACHE}; the baseline reads the zeros of a sparse file",
    ),
    *_loop_cells(),
    Cell(
        "chain-8",
        "chain of 8, 4 KiB random read, O_DIRECT, 16 in flight",
        "IOPS",
        "chain",
        RANDOM_READ_16,
        3,
        0.4,
        note="the baseline reads one flat file",
    ),
    Cell(
        "randread-4k-16-coldhost",
        "4 KiB random read, O_DIRECT, 16 in flight, the host's cache cold",
        "IOPS",
        "full",
        RANDOM_READ_16,
        1,
        cold="host",
        note="dominated by the host's disk",
    ),
)

CHAIN_COST: Final = 1.25
"""The target for the cost of a read through the chain, in reads of a single image."""


def select_cells(pattern: str | None) -> list[Cell]:
    """Return the cells whose names match a regular expression, or all for None.

    Raises:
        ValueError: It is no regular expression, or matches no name.
    """
    try:
        found = [cell for cell in CELLS if re.search(pattern or "", cell.name)]
    except re.error as error:
        msg = f"--cells: found {pattern!r}, expected a regular expression: {error}"
        raise ValueError(msg) from None
    if not found:
        msg = f"--cells: found no cell for {pattern!r}, expected one of those that --list shows"
        raise ValueError(msg)
    return found
