"""One rule for L1 entries: `info`, the check and the disk agree about each."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from qedfuse.check.checker import check_image
from qedfuse.check.findings import Code
from qedfuse.cli.qedimg.infojson import json_value
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.tools.inspection.info import ImageInfo, describe
from tests.support.disks import build_image, put_entry
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.check.findings import CheckReport

CLUSTER_BYTES: Final = 4096
L1_CODES: Final = {
    Code.L1_RESERVED_BITS,
    Code.L1_UNALIGNED,
    Code.L1_OUT_OF_FILE,
    Code.L1_CUT_SHORT,
    Code.L1_OVER_METADATA,
    Code.TABLE_OVERLAP,
}


async def inspect(content: bytes) -> tuple[CheckReport, bool]:
    """Check an image, and return also whether a disk accepts all its L1 entries."""
    file = MemoryFile(content)
    header = await read_header(file)
    report = await check_image(file, header)
    layer = QedLayer(file, header, make_store(0))
    try:
        await layer.scan_l1()
    except CorruptImageError:
        return report, False
    return report, not layer.damaged


def is_safe(info: ImageInfo) -> bool:
    """Return the verdict ``safe-to-mount``."""
    return bool(json_value(info, None)["safety"]["safe-to-mount"])


@pytest.mark.parametrize(
    ("table_size", "header_size", "tail"), [(1, 1, 0), (2, 1, 512), (2, 3, CLUSTER_BYTES)]
)
async def test_all_agree_on_l1_entries(
    tmp_path: Path, table_size: int, header_size: int, tail: int
) -> None:
    """The three agree about each offset in a small file, alone and with another entry."""
    path = tmp_path / "image.qed"
    image = build_image(1 << 20, table_size=table_size, header_size=header_size)
    image.extend(bytes(8 * CLUSTER_BYTES + tail))
    offsets = [
        *range(CLUSTER_BYTES, len(image) + 2 * CLUSTER_BYTES, CLUSTER_BYTES),
        512,
        CLUSTER_BYTES + 8,
        (1 << 64) - 1,
    ]
    l1_table = header_size * CLUSTER_BYTES
    verdicts = set()
    for first, second in itertools.product(offsets, (0, 0x9000, 0xA000)):
        put_entry(image, l1_table, first)
        put_entry(image, l1_table + 8, second)
        path.write_bytes(image)
        report, disk_agrees = await inspect(bytes(image))
        sound = not L1_CODES & report.counts.keys()
        assert disk_agrees == sound, (first, second, report.counts)
        info = describe(str(path))
        assert info.qed is not None
        assert is_safe(info) == sound, (first, second, report.counts)
        words = {problem.code for problem in info.qed.problems if problem.code != "odd-tail"}
        overlap = Code.TABLE_OVERLAP in report.counts
        assert ("table-overlap" in words) == overlap, (first, second)
        assert ("l1-wild" in words) == bool(L1_CODES & report.counts.keys() - {Code.TABLE_OVERLAP})
        verdicts.add((sound, overlap))
    assert verdicts == {(True, False), (False, False), (False, True)}


def test_tables_that_were_not_read_are_not_safe(tmp_path: Path) -> None:
    """An L1 table that is too long to be read completely is not called safe."""
    path = tmp_path / "image.qed"
    image = build_image(1 << 40, cluster_size=1 << 20, table_size=16)
    path.write_bytes(image)
    assert is_safe(describe(str(path))), "zeros are no entries, also where they take up space"
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(np.ones(16 << 17, np.uint64).tobytes())
        file.truncate(1 << 30)
    info = describe(str(path))
    assert info.qed is not None
    assert info.qed.l2_tables is None
    assert not is_safe(info)
