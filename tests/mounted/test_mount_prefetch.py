"""Mounts with ``prefetch=all``: the disk needs no server then, and the mount ends at any time."""

from __future__ import annotations

import random
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import qemu
from tests.support.mounted import front, qedfuse, refused
from tests.support.webserver import PATIENCE, WebServer, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK_BYTES = 16 << 20


@pytest.fixture
def content() -> bytes:
    """Give the content of a disk with data at both ends."""
    data = random.Random(7).randbytes(4 << 20)
    return data + bytes(DISK_BYTES - 2 * len(data)) + data


@pytest.fixture
def server(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serve an image with this content, with an empty cache for those who read it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw, image = tmp_path / "golden.raw", tmp_path / "golden.qed"
    raw.write_bytes(content)
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qed", raw, image)
    with serving(image.read_bytes()) as server:
        yield server


def test_all_is_read_without_the_server(server: WebServer, content: bytes, tmp_path: Path) -> None:
    """When the prefetch has ended, which the log says, the disk is read without the server."""
    overlay = f"overlay={tmp_path / 'vm1.qed'},prefetch=all"
    with front("-o", overlay, server.url, tmp_path / "mnt") as mount:
        line = mount.read_line()
        assert f"{tmp_path / 'mnt'}: prefetch ended: all " in line
        assert "bytes that the disks can need are in the cache" in line
        server.always = "status 404"
        assert (tmp_path / "mnt" / "disk.raw").read_bytes() == content
        assert not server.struck
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


def test_the_mount_ends_while_the_server_is_silent(server: WebServer, tmp_path: Path) -> None:
    """A prefetch that waits for the server delays no unmount, and leaves no line in the log."""
    server.healthy = 5
    server.always = "silence"
    with front("-o", f"ro,prefetch=all,{PATIENCE}", server.url, tmp_path / "mnt") as mount:
        wait_until(lambda: server.struck["silence"])
        assert qedfuse("umount", mount.mountpoint).returncode == 0
        code, log = mount.finish()
        assert code == 0
        assert "prefetch" not in log


def test_without_the_option_nothing_is_fetched(server: WebServer, tmp_path: Path) -> None:
    """By default only what is read is fetched; another value of the option is refused."""
    with front("-r", server.url, tmp_path / "mnt") as mount:
        subprocess.run(["ls", "-l", mount.mountpoint], check=True, capture_output=True)
        assert server.sent_bytes < len(server.content) // 2
    line = refused(server.url, tmp_path / "mnt", "-r", "-o", "prefetch=some", code=1)
    assert line == "option prefetch: found some, expected off or all"
