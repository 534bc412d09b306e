"""What a mount writes to its log while it serves."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import build_image, l2_entry_offset, put_entry
from tests.support.mounted import front

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = 4096


def test_each_error_is_logged_once_and_the_rest_is_counted(tmp_path: Path) -> None:
    """A bad entry that is read is one line; of hundreds the log has a hundred and a number."""
    path = tmp_path / "bad.qed"
    image = build_image(512 * CLUSTER, dict.fromkeys(range(150), b"x"))
    for number in range(150):
        put_entry(image, l2_entry_offset(image, number), (1 << 40) + number * CLUSTER)
    path.write_bytes(image)
    with front("-o", "ro,direct_io", path, tmp_path / "mnt") as mount:
        disk = os.open(mount.mountpoint / "bad.raw", os.O_RDONLY)
        for number in range(150):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(disk, CLUSTER, number * CLUSTER)
        os.close(disk)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 0, log
    lines = [line for line in log.split("\n") if "L2 entry" in line]
    assert len(lines) == 101
    assert len(set(lines)) == 101
    assert lines[0].startswith(f"qedfuse: {path}: L1 entry 0: L2 entry 0: found 1099511627776")
    assert lines[100].startswith(
        f"qedfuse: {path}: 50 more errors not logged one by one, the last: {path}: L1 entry 0: "
        "L2 entry 149: found"
    )
