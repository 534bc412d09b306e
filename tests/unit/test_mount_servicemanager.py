"""Notifying the service manager: every line arrives, and the mount never waits."""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import closing, suppress
from typing import TYPE_CHECKING, NoReturn

import pytest

from qedfuse.mount.process.servicemanager import ServiceManager
from qedfuse.util.descriptors import open_descriptors
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from pathlib import Path


def fill(path: Path) -> None:
    """Send lines to a socket until its queue is full."""
    sent = 1
    # A sender reaches the limit of its own buffer first if the queue may be long
    # (net.unix.max_dgram_qlen, which systemd makes longer).
    while sent:
        sent = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, suppress(BlockingIOError):
            other.connect(str(path))
            other.settimeout(0)
            while True:
                other.send(b"WATCHDOG=1")
                sent += 1


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    abstract: bool,  # noqa: FBT001
) -> None:
    """Systemd gets its line at both kinds of socket, although a mount hides the path."""
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with closing(ServiceManager()) as unconnected:
        unconnected.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        manager = ServiceManager()
        if not abstract:
            (tmp_path / "notify").unlink()
        manager.notify("READY=1")
        assert listener.recv(100) == b"READY=1"
    with closing(manager):
        manager.notify("STOPPING=1")  # the listener is closed
    monkeypatch.delenv("NOTIFY_SOCKET")
    with closing(ServiceManager()) as unconnected:
        unconnected.notify("READY=1")


def test_a_mount_works_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host refuses a socket, the service manager is not notified."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")

    def fail(*_arguments: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", fail)
    with closing(ServiceManager()) as unconnected:
        unconnected.notify("READY=1")


def test_a_slow_service_manager_gets_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service manager that reads late gets all lines in order, and does not block the mount."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        with closing(ServiceManager()) as manager:
            fill(tmp_path / "notify")
            manager.notify("READY=1")
            manager.notify("STOPPING=1")
        received = [b""]
        while received[-1] != b"STOPPING=1":
            received.append(listener.recv(100))
    assert received[-3:] == [b"WATCHDOG=1", b"READY=1", b"STOPPING=1"]


def test_a_line_is_dropped_if_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the socket is full and the host refuses a thread, the line is lost, and nothing else."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        with closing(ServiceManager()) as manager:
            fill(tmp_path / "notify")
            before = open_descriptors()
            run_without(CLONE3, lambda: manager.notify("READY=1"))
            assert open_descriptors() == before
            while listener.recv(100, socket.MSG_PEEK) != b"READY=1":
                listener.recv(100)
                if not select.select([listener], [], [], 0)[0]:
                    break
            manager.notify("STOPPING=1")
            assert listener.recv(100) == b"STOPPING=1"
