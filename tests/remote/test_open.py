"""``qedfuse.open`` of a URL: a server that does not answer delays neither a close nor Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse.errors import RemoteError
from tests.support import qemu
from tests.support.programs import environment
from tests.support.webserver import WebServer, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
FAR = 6 * MIB
"""Offset in the disk of data that is not read by the opening."""
MAX_SECONDS = 8.0
"""After this time a call must have ended that waits for no server.  An attempt takes 10 seconds."""

READ = f"""
import sys, qedfuse
with qedfuse.open(sys.argv[1]) as disk:
    disk.seek({FAR})
    disk.read(10)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serve an image with data, with an empty cache for those who read it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = qemu.create(tmp_path / "disk.qed", 8 * MIB)
    qemu.io(image, "write -P 7 0 8M")
    with serving(image.read_bytes()) as server:
        yield server


@pytest.mark.parametrize("way", ["close", "del"])
def test_a_close_waits_for_no_server(way: str, server: WebServer) -> None:
    """A close ends while a read of another thread waits for a server, and that read fails."""
    disk = qedfuse.open(server.url)
    assert disk.read(8) == bytes([7]) * 8
    server.always = "silence"
    errors: list[BaseException] = []

    def read() -> None:
        disk.seek(FAR)
        try:
            disk.read(8)
        except RemoteError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: server.struck["silence"])
    start = time.monotonic()
    if way == "close":
        disk.close()
    else:
        disk._portal.ask_to_close()  # what the finalizer does
    reader.join()
    disk.close()
    assert time.monotonic() - start < MAX_SECONDS
    assert [str(error) for error in errors] == [
        f"{server.url}: found the file closed, expected it open"
    ]


@pytest.mark.parametrize("healthy", [0, 1, 2, None], ids=["HEAD", "header", "table", "data"])
def test_ctrl_c_waits_for_no_server(healthy: int | None, server: WebServer) -> None:
    """Ctrl-C ends a program that waits for a server, during the opening and during a read."""
    if healthy is None:
        with qedfuse.open(server.url) as disk:
            disk.read(8)  # the header and the tables are in the cache from here on
        healthy = 1
    server.healthy = healthy
    server.always = "silence"
    process = subprocess.Popen(
        [sys.executable, "-c", READ, server.url],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    wait_until(lambda: server.struck["silence"])
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert log.splitlines()[-1] == "KeyboardInterrupt", log
    assert time.monotonic() - start < MAX_SECONDS
