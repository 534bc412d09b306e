"""While a mount is served, its server imports no module, codecs included.

A mount may cover the directory of a module.  A server that imported the module then would wait for
its own reply.
"""

from __future__ import annotations

import os
import random
import signal
import socket
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.mounted import front, qedfuse
from tests.support.partitiontables import partition

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.mounted import FrontMount

DISK_BYTES: Final = 16 << 20

WATCHED: Final = """
import logging, os, sys, warnings
import qedfuse.mount.session  # before pyfuse3: the extension is loaded first
import pyfuse3
from qedfuse.disk.disk import Disk
from qedfuse.mount import serving
from qedfuse.mount.process import logs

attach, close, statvfs = serving.attach, pyfuse3.close, Disk.statvfs
is_mounted = False

def report(event, args):
    if event == "import" and is_mounted:
        os.write(2, f"late import: {args[0]}\\n".encode())

def attach_and_watch(*args):
    global is_mounted
    connection = attach(*args)
    is_mounted = True
    return connection

def close_watched(**how):
    global is_mounted
    is_mounted = False
    close(**how)

def fail_once(self):
    Disk.statvfs = statvfs
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("an odd request")
    try:
        try:
            raise OSError("a cause")
        except OSError as error:
            raise LookupError("no printable text: \\a") from error
    except LookupError as error:
        record = logging.makeLogRecord({"exc_info": sys.exc_info()})
        print(system_log.format(record), file=sys.stderr)
        raise

system_log = logs.system_log("/proc/self/none").formatter
serving.attach, pyfuse3.close = attach_and_watch, close_watched
Disk.statvfs = fail_once
sys.addaudithook(report)
"""
"""Code that a server runs first: it reports every import while it serves, and fails at statfs(2).

The name of an import is the argument of an audit event, which occurs only if the module has not
been imported before.
"""


def ask(path: Path, request: bytes) -> bytes:
    """Return the reply of a server that listens at a path."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


def read_up_to(mount: FrontMount, expected: str) -> str:
    """Return the next lines of a mount's log, up to the first one that contains ``expected``."""
    lines = ""
    while True:
        line = mount.read_line()
        lines += line
        if expected in line:
            return lines
        assert line, f"the server has ended: {lines}"


@pytest.mark.parametrize("end", ["unmount", "force"])
def test_nothing_is_imported_while_a_mount_is_served(end: str, tmp_path: Path) -> None:
    """Statistics, metrics, logs, errors, and tables of partitions need no further module."""
    image = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    metrics, log = tmp_path / "metrics", ""
    words = ("-o", f"partitions,growable,compact=full,metrics=unix:{metrics}")
    with front(*words, image, tmp_path / "mnt", prelude=WATCHED) as mount:
        disk = mount.mountpoint / "vm.raw"
        for request in (b"GET /metrics HTTP/1.0\n\n", b"HEAD / HTTP/1.0\n\n", b"\xff\n\n"):
            assert ask(metrics, request).startswith(b"HTTP/1.0 ")
        assert qedfuse("stats", mount.mountpoint, "--output=json").returncode == 0
        for number, expected in ((signal.SIGUSR1, "open handles 0"), (signal.SIGUSR2, "tasks: ")):
            mount.signal(number)
            log += read_up_to(mount, expected)
        with pytest.raises(OSError, match="Input/output error"):
            os.statvfs(disk)
        for label in ("dos", "gpt"):
            partition(disk, [f"label: {label}", "start=2048, size=2048"])
            assert len(list(mount.mountpoint.iterdir())) == 2
        fd = os.open(disk, os.O_RDWR)
        os.write(fd, random.Random(end).randbytes(1 << 20))
        os.ftruncate(fd, DISK_BYTES + 4096)
        os.posix_fallocate(fd, 0, 1 << 20)
        with pytest.raises(OSError, match="File too large"):
            os.ftruncate(fd, 1 << 62)
        if end == "unmount":
            os.close(fd)
        mount.signal(signal.SIGTERM)
        if end == "force":
            log += read_up_to(mount, "still in use")
            mount.signal(signal.SIGTERM)
        code, rest = mount.finish()
        if end == "force":
            with pytest.raises(OSError, match="not connected"):
                os.close(fd)
    log += rest
    assert code == 0, log
    assert "late import" not in log
    for expected in (
        "an odd request",
        "internal error in statfs",
        r"LookupError: no printable text: \x07",
    ):
        assert expected in log
