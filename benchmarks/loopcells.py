"""The cells whose loads use an ext4 file system on the disk, through a loop device."""

from __future__ import annotations

from typing import Final, Literal

from benchmarks.cells import KIB, Cell, Fio


def _cells(kind: Literal["buffered", "direct"]) -> tuple[Cell, ...]:
    """Return the cells for one kind of loop device."""
    name = "loop" if kind == "buffered" else "loopdio"
    what = "ext4 on losetup" + (" --direct-io=on" if kind == "direct" else "")
    return (
        Cell(
            f"{name}-copy",
            f"{what}: copy a source tree and sync",
            "s",
            "empty",
            "copy",
            loop=kind,
        ),
        Cell(f"{name}-tar", f"{what}: tar it cold", "s", "empty", "tar", loop=kind),
        Cell(
            f"{name}-rand-4k",
            f"{what}: 4 KiB random, half writes, 16 in flight",
            "IOPS",
            "empty",
            Fio("randrw", 4 * KIB, depth=16),
            loop=kind,
        ),
    )


LOOP_CELLS: Final = (
    *_cells("buffered"),
    *_cells("direct"),
    Cell(
        "loopdio-fsync-4k",
        "ext4 on losetup --direct-io=on: 4 KiB random write, fsync after each",
        "IOPS",
        "empty",
        Fio("randwrite", 4 * KIB, direct=False, fsync=True),
        loop="direct",
        note="what a database does for each commit",
    ),
)
