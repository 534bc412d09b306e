"""The cells whose loads use the disk itself."""

from __future__ import annotations

from typing import Final

from benchmarks.cells import KIB, MIB, Cell, Fio

RANDOM_READ_16: Final = Fio("randread", 4 * KIB, depth=16)
RANDOM_WRITE_16: Final = Fio("randwrite", 4 * KIB, depth=16)
CAT_BYTES: Final = 128 * KIB
"""The size of a read of cat(1) and cp(1)."""
WHOLE_DISK: Final = 1 << 62
"""More bytes than any disk has: the load ends at the end of the disk."""
_REWRITTEN: Final = Fio("randwrite", 4 * KIB, depth=16, area=128 * MIB)
"""A part of the disk that a first pass can write completely in a short time."""

_REWRITTEN_SOON: Final = Fio("randwrite", 4 * KIB, depth=16, area=16 * MIB)
"""So small a part that pages are written again while their write-back lasts."""

_NO_CACHE: Final = "QEMU's mount has no page cache, every read goes to the server"
_FLAT: Final = "the baseline has no base to copy from"
_HOST_DISK: Final = "dominated by the host's disk"

RANDOM_CELLS: Final = (
    Cell(
        "randread-4k-1",
        "4 KiB random read, O_DIRECT, 1 in flight",
        "IOPS",
        "full",
        Fio("randread", 4 * KIB),
    ),
    Cell(
        "randread-4k-16",
        "4 KiB random read, O_DIRECT, 16 in flight",
        "IOPS",
        "full",
        RANDOM_READ_16,
    ),
    Cell(
        "randread-4k-4procs",
        "4 KiB random read, O_DIRECT, 4 processes",
        "IOPS",
        "full",
        Fio("randread", 4 * KIB, processes=4),
    ),
    Cell(
        "overwrite-4k-1",
        "4 KiB random overwrite, O_DIRECT, 1 in flight",
        "IOPS",
        "full",
        Fio("randwrite", 4 * KIB),
    ),
    Cell(
        "overwrite-4k-16",
        "4 KiB random overwrite, O_DIRECT, 16 in flight, dirty pages",
        "IOPS",
        "full",
        _REWRITTEN,
        baseline_target=0.5,
        pages="dirty",
    ),
    Cell(
        "overwrite-4k-16-clean",
        "4 KiB random overwrite, O_DIRECT, 16 in flight, clean pages",
        "IOPS",
        "full",
        RANDOM_WRITE_16,
        1.2,
        pages="clean",
        note="each round on a new copy of the image, which cp left in the host's page cache",
    ),
    Cell(
        "overwrite-4k-16-writeback",
        "4 KiB random overwrite, O_DIRECT, 16 in flight, pages under write-back",
        "IOPS",
        "full",
        _REWRITTEN_SOON,
        1.2,
        pages="under write-back",
    ),
    Cell(
        "mixed-16k-8",
        "16 KiB random, half writes, O_DIRECT, 8 in flight",
        "IOPS",
        "full",
        Fio("randrw", 16 * KIB, depth=8),
    ),
    Cell(
        "randread-64k-4",
        "64 KiB random read, O_DIRECT, 4 in flight",
        "IOPS",
        "full",
        Fio("randread", 64 * KIB, depth=4),
        1.5,
        0.75,
    ),
    Cell(
        "new-write-4k-16",
        "4 KiB random write into a new image, O_DIRECT, 16 in flight",
        "IOPS",
        "empty",
        RANDOM_WRITE_16,
    ),
    Cell(
        "cow-write-4k-16",
        "4 KiB random write over a backing file, O_DIRECT, 16 in flight",
        "IOPS",
        "overlay",
        RANDOM_WRITE_16,
        note=_FLAT,
    ),
    Cell(
        "fsync-write-4k",
        "4 KiB random write, O_DIRECT, fsync after each",
        "IOPS",
        "full",
        Fio("randwrite", 4 * KIB, fsync=True),
    ),
    Cell(
        "buffered-fsync-4k",
        "buffered 4 KiB random write, fsync after each",
        "IOPS",
        "full",
        Fio("randwrite", 4 * KIB, direct=False, fsync=True),
    ),
    Cell(
        "chain-8",
        "chain of 8, 4 KiB random read, O_DIRECT, 16 in flight",
        "IOPS",
        "chain",
        RANDOM_READ_16,
        note="the baseline reads one flat file",
    ),
    Cell(
        "randread-4k-16-coldhost",
        "4 KiB random read, O_DIRECT, 16 in flight, the host's cache cold",
        "IOPS",
        "full",
        RANDOM_READ_16,
        1.2,
        cold="host",
        note=_HOST_DISK,
    ),
)

SEQUENTIAL_CELLS: Final = (
    Cell("read-1m", "1 MiB sequential read, O_DIRECT", "MiB/s", "full", Fio("read", MIB)),
    Cell(
        "read-1m-coldhost",
        "1 MiB sequential read, O_DIRECT, the host's cache cold",
        "MiB/s",
        "full",
        Fio("read", MIB, max_bytes=WHOLE_DISK),
        cold="host",
    ),
    Cell(
        "read-128k-coldhost",
        "128 KiB sequential read, O_DIRECT, the host's cache cold",
        "MiB/s",
        "full",
        Fio("read", 128 * KIB, max_bytes=WHOLE_DISK),
        cold="host",
    ),
    Cell(
        "cp-coldhost",
        "cp of the whole disk to a file on the host, the host's cache cold",
        "s",
        "full",
        "cp",
        cold="host",
    ),
    Cell(
        "overwrite-1m",
        "1 MiB sequential overwrite, O_DIRECT",
        "MiB/s",
        "full",
        Fio("write", MIB),
        baseline_target=0.9,
    ),
    Cell(
        "new-write-1m",
        "1 MiB sequential write into a new image, O_DIRECT, fsync at the end",
        "MiB/s",
        "empty",
        Fio("write", MIB, fsync_at_end=True, max_bytes=512 * MIB),
        baseline_target=0.9,
        note=_HOST_DISK,
    ),
    Cell(
        "buffered-read-cold",
        "buffered sequential read, cold",
        "MiB/s",
        "full",
        Fio("read", CAT_BYTES, direct=False, max_bytes=1024 * MIB),
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
        warm=True,
        note=_NO_CACHE,
    ),
    Cell(
        "buffered-write-4k",
        "buffered 4 KiB sequential write, fsync at the end",
        "MiB/s",
        "full",
        Fio("write", 4 * KIB, direct=False, fsync_at_end=True, max_bytes=256 * MIB),
    ),
    Cell(
        "hole-seek",
        "10 GiB of hole: SEEK_DATA and SEEK_HOLE from end to end",
        "walks/s",
        "hole",
        "walk",
        note="all systems implement lseek; one cluster of data ends the hole",
    ),
    Cell(
        "hole-read",
        "10 GiB of hole: plain buffered read",
        "MiB/s",
        "hole",
        Fio("read", CAT_BYTES, direct=False, max_bytes=10240 * MIB),
        cold="mount",
        note=f"{_NO_CACHE}; the baseline reads the zeros of a sparse file",
    ),
)

SEVERAL_DISKS_CELLS: Final = (
    Cell(
        "disks-2-read",
        "2 disks of one mount, 4 KiB random read, O_DIRECT, 16 in flight on each",
        "IOPS",
        "part",
        (RANDOM_READ_16,) * 2,
    ),
    Cell(
        "disks-4-read",
        "4 disks of one mount, 4 KiB random read, O_DIRECT, 16 in flight on each",
        "IOPS",
        "part",
        (RANDOM_READ_16,) * 4,
    ),
    Cell(
        "disks-2-read-write",
        "2 disks of one mount, 16 4 KiB reads in flight on one, 16 overwrites on the other",
        "IOPS",
        "part",
        (RANDOM_READ_16, RANDOM_WRITE_16),
    ),
)
