"""The same damage, row by row, for ``qemu-img check`` and the checker, and what a repair leaves.

QEMU wrote the images.  It accepts a cluster that the end of the file cuts short, and refuses
to open an image whose L1 table is cut short; otherwise the verdicts are the same.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.check.checker import check_image
from qedfuse.check.findings import CheckReport, Code
from qedfuse.check.repair import RepairReport, repair_image
from qedfuse.errors import HeaderError, NotQedError, UnsupportedError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DISK_BYTES: Final = 64 << 20
CLUSTER_BYTES: Final = 65536
L1: Final = CLUSTER_BYTES
DATA: Final = 6
"""Number of guest clusters that hold data, from the first on."""


class Image:
    """An image that QEMU wrote, with operations that damage it."""

    def __init__(self, path: Path) -> None:
        """Create it."""
        self.path = path
        qemu.create(path, DISK_BYTES)
        qemu.io(
            path, *(f"write -P {n + 1} {n * CLUSTER_BYTES} {CLUSTER_BYTES}" for n in range(DATA))
        )
        self.l2 = self.entry(L1, 0)
        self.end = path.stat().st_size

    def entry(self, table: int, index: int) -> int:
        """Read an entry of the table at a file offset."""
        with self.path.open("rb") as file:
            file.seek(table + 8 * index)
            return int.from_bytes(file.read(8), "little")

    def put(self, offset: int, layout: str, value: int) -> None:
        """Overwrite a number."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(layout, value))

    def l1_entry(self, index: int, value: int) -> None:
        """Overwrite an L1 entry."""
        self.put(L1 + 8 * index, "<Q", value)

    def l2_entry(self, index: int, value: int) -> None:
        """Overwrite an entry of the only L2 table."""
        self.put(self.l2 + 8 * index, "<Q", value)

    def resize(self, change: int) -> None:
        """Change the length of the file."""
        os.truncate(self.path, self.end + change)


ENTRIES: Final = 4 * CLUSTER_BYTES // 8
MISSING_TABLE: Final = frozenset(range(DATA))
NOTHING: Final[frozenset[int]] = frozenset()

# row: (damage, worst finding, exit code of qedimg, of qemu-img, guest clusters that are lost)
TABLE_ROWS: Final[
    dict[str, tuple[Callable[[Image], None], Code | None, int, int, frozenset[int]]]
] = {
    "sound": (lambda _i: None, None, 0, 0, NOTHING),
    "header-size-0": (lambda i: i.put(12, "<I", 0), Code.HEADER_SIZE_ZERO, 0, 3, NOTHING),
    "l1-unaligned": (
        lambda i: i.l1_entry(0, i.l2 + 512), Code.L1_RESERVED_BITS, 2, 2, MISSING_TABLE,
    ),
    "l1-unaligned-4k": (
        lambda i: i.l1_entry(0, i.l2 + 4096), Code.L1_UNALIGNED, 2, 2, MISSING_TABLE,
    ),
    "l1-outside": (lambda i: i.l1_entry(0, 1 << 40), Code.L1_OUT_OF_FILE, 2, 2, MISSING_TABLE),
    "l1-is-1": (lambda i: i.l1_entry(0, 1), Code.L1_RESERVED_BITS, 2, 2, MISSING_TABLE),
    "l1-overruns": (
        lambda i: i.l1_entry(0, i.end - CLUSTER_BYTES), Code.L1_CUT_SHORT, 2, 2, MISSING_TABLE,
    ),
    "l1-is-l1": (lambda i: i.l1_entry(0, L1), Code.L1_OVER_METADATA, 2, 2, MISSING_TABLE),
    "l1-twice": (lambda i: i.l1_entry(1, i.l2), Code.TABLE_OVERLAP, 2, 2, NOTHING),
    "l1-last-twice": (lambda i: i.l1_entry(ENTRIES - 1, i.l2), Code.TABLE_OVERLAP, 2, 2, NOTHING),
    "l2-unaligned": (
        lambda i: i.l2_entry(0, i.entry(i.l2, 0) + 8), Code.L2_RESERVED_BITS, 2, 2, frozenset({0}),
    ),
    "l2-outside": (lambda i: i.l2_entry(0, 1 << 40), Code.L2_OUT_OF_FILE, 2, 2, frozenset({0})),
    "l2-is-2": (lambda i: i.l2_entry(0, 2), Code.L2_RESERVED_BITS, 2, 2, frozenset({0})),
    "l2-twice": (lambda i: i.l2_entry(1, i.entry(i.l2, 0)), Code.DUPLICATE_CLUSTER, 2, 2, NOTHING),
    "l2-is-l2": (lambda i: i.l2_entry(1, i.l2), Code.L2_OVER_METADATA, 2, 2, frozenset({1})),
    "l2-is-l1": (lambda i: i.l2_entry(1, L1), Code.L2_OVER_METADATA, 2, 2, frozenset({1})),
    "appended": (lambda i: i.resize(10 * CLUSTER_BYTES), Code.LEAKED_CLUSTERS, 3, 3, NOTHING),
    "l2-cleared": (lambda i: i.l2_entry(2, 0), Code.LEAKED_CLUSTERS, 3, 3, NOTHING),
    "cut-1-cluster": (
        lambda i: i.resize(-CLUSTER_BYTES - 100), Code.L2_OUT_OF_FILE, 2, 2, frozenset({4, 5}),
    ),
    # QEMU rounds the file's length up and sees nothing wrong.
    "cut-100-bytes": (lambda i: i.resize(-100), Code.L2_CUT_SHORT, 2, 0, frozenset({5})),
    "past-size": (lambda i: i.put(48, "<Q", CLUSTER_BYTES), Code.PAST_IMAGE_SIZE, 0, 0, NOTHING),
    "need-check": (lambda i: i.put(16, "<Q", 2), Code.NEED_CHECK_SET, 0, 0, NOTHING),
    "compat": (lambda i: i.put(24, "<Q", 1), Code.UNKNOWN_COMPAT, 0, 0, NOTHING),
    "autoclear": (lambda i: i.put(32, "<Q", 1), Code.UNKNOWN_AUTOCLEAR, 0, 0, NOTHING),
}  # fmt: skip


def check(path: Path) -> CheckReport:
    """Check an image file."""

    async def work() -> CheckReport:
        return await check_image(file, await read_header(file))

    file = PosixFile.open(str(path))
    try:
        return trio.run(work)
    finally:
        file.close()


def repair(path: Path) -> RepairReport:
    """Repair an image file."""

    async def work() -> RepairReport:
        return await repair_image(file, await read_header(file))

    file = PosixFile.open(str(path), writable=True)
    try:
        return trio.run(work)
    finally:
        file.close()


@pytest.mark.parametrize("row", TABLE_ROWS)
def test_verdicts_agree_and_repair_satisfies_qemu(row: str, tmp_path: Path) -> None:
    """Both checkers agree on each damage, and a repair satisfies both and keeps other data."""
    damage, code, ours, theirs, lost = TABLE_ROWS[row]
    image = Image(tmp_path / "damaged.qed")
    damage(image)
    if row == "need-check":
        # QEMU's check clears the bit, so it looks at a copy.
        copy = tmp_path / "copy.qed"
        copy.write_bytes(image.path.read_bytes())
        assert qemu.check(copy).code == theirs
    else:
        assert qemu.check(image.path).code == theirs

    found = check(image.path)
    assert (2 if found.errors else 3 if found.leaks else 0) == ours
    assert set(found.counts) >= ({code} if code else set())

    result = repair(image.path)
    assert result.after.errors == 0
    assert result.after.leaks == check(image.path).leaks
    assert qemu.check(image.path).code in (0, 3)
    reported = {item.start // CLUSTER_BYTES + n for item in result.lost
                for n in range(-(-item.length // CLUSTER_BYTES))}  # fmt: skip
    assert reported & set(range(DATA)) == lost
    disk = qemu.content(image.path)
    gone = lost | ({2} if row == "l2-cleared" else set()) | ({1} if row == "l2-twice" else set())
    for number in set(range(min(DATA, len(disk) // CLUSTER_BYTES))) - gone:
        part = disk[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES]
        assert part == bytes([number + 1]) * CLUSTER_BYTES, number


HEADER_ROWS: Final[dict[str, tuple[int, str, int]]] = {
    "magic": (0, "<I", 1),
    "cluster-size-0": (4, "<I", 0),
    "cluster-size-65537": (4, "<I", 65537),
    "table-size-0": (8, "<I", 0),
    "table-size-32": (8, "<I", 32),
    "header-size-100": (12, "<I", 100),
    "feature": (16, "<Q", 8),
    "l1-0": (40, "<Q", 0),
    "l1-unaligned": (40, "<Q", L1 + 8),
    "l1-outside": (40, "<Q", 1 << 40),
    "image-size-2^63": (48, "<Q", 1 << 63),
    "image-size-513": (48, "<Q", 513),
}


@pytest.mark.parametrize("row", HEADER_ROWS)
def test_headers_that_qemu_refuses_are_refused(row: str, tmp_path: Path) -> None:
    """A header that QEMU refuses to open is refused before any check."""
    offset, layout, value = HEADER_ROWS[row]
    image = Image(tmp_path / "damaged.qed")
    image.put(offset, layout, value)
    with pytest.raises(qemu.QemuError, match="exit code 1"):
        qemu.check(image.path)
    with pytest.raises((HeaderError, NotQedError, UnsupportedError)):
        check(image.path)


def test_a_wrong_cluster_size_shows_as_mostly_leaked(tmp_path: Path) -> None:
    """With a wrong cluster size both find only leaks, and the checker reports a suspicion."""
    image = Image(tmp_path / "damaged.qed")
    image.put(4, "<I", 4096)
    found = check(image.path)
    assert qemu.check(image.path).code == 3
    assert found.errors == 0
    assert Code.MOSTLY_LEAKED in found.counts
