"""What a mount writes to its log while it serves."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.disks import build_image, l2_entry_offset, put_entry
from tests.support.mounted import TIMEOUT, front

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER_BYTES = 4096


def test_errors_are_logged_up_to_a_limit_and_counted(tmp_path: Path) -> None:
    """Of 150 different errors the log has 100 lines and one line with the number of the others."""
    path = tmp_path / "bad.qed"
    image = build_image(512 * CLUSTER_BYTES, dict.fromkeys(range(150), b"x"))
    for number in range(150):
        put_entry(image, l2_entry_offset(image, number), (1 << 40) + number * CLUSTER_BYTES)
    path.write_bytes(image)
    with front("-o", "ro,direct_io", path, tmp_path / "mnt") as mount:
        disk = os.open(mount.mountpoint / "bad.raw", os.O_RDONLY)
        for number in range(150):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(disk, CLUSTER_BYTES, number * CLUSTER_BYTES)
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


def test_a_full_log_does_not_block_requests(tmp_path: Path) -> None:
    """A mount whose standard error is full answers requests, and logs later what was dropped."""
    path = tmp_path / "bad.qed"
    image = build_image(512 * CLUSTER_BYTES, dict.fromkeys(range(2), b"x"))
    put_entry(image, l2_entry_offset(image, 0), 1 << 40)
    path.write_bytes(image)
    with front("-o", "ro,direct_io", path, tmp_path / "mnt") as mount:
        mount.wait_for_sandbox()
        pipe = os.open(f"/proc/{mount.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(pipe, b"." * 4095 + b"\n")
        os.close(pipe)
        # Nothing but the end of the server ends a read that it does not answer.
        watchdog = threading.Timer(TIMEOUT, mount.process.kill)
        watchdog.start()
        disk = os.open(mount.mountpoint / "bad.raw", os.O_RDONLY)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(disk, CLUSTER_BYTES, 0)
        assert os.pread(disk, 1, CLUSTER_BYTES) == b"x"
        os.close(disk)
        watchdog.cancel()
        assert mount.read_line() == "." * 4095 + "\n"
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 0, log
    assert "1 message was dropped here" in log
    assert "the images are closed" in log
