"""Laundering through the launderer, and the end of the session while a task waits for it."""

from __future__ import annotations

import errno
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from qedfuse.mount.fuse.launderer import ANSWER, Launderer, _serve
from qedfuse.mount.fuse.laundering import Laundering
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk


def exported_disk() -> ExportedDisk:
    """Make a disk without writes in progress."""
    disk = SimpleNamespace(size=1 << 20)
    return cast("ExportedDisk", SimpleNamespace(inode=2, disk=disk, slow_writes=0))


async def test_the_session_may_end_while_a_task_waits() -> None:
    """A task that waits for laundering gets False, and so does every later caller."""
    connection, _other = socket.socketpair()
    process = Launderer.__new__(Launderer)
    process.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    laundering = Laundering(process)
    laundering.connect(connection.fileno())
    answers = []

    async def ask() -> None:
        answers.append(await laundering.launder(exported_disk()))

    with connection, _other, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            byte, (passed,), _flags, _address = socket.recv_fds(theirs, 1, 1)
            os.close(passed)
            assert byte
            assert len(theirs.recv(64)) > ANSWER.size
            laundering.stop()
        assert answers == [False]
        assert await laundering.launder(exported_disk()) is False


async def test_a_disk_does_not_wait_for_another_one(autojump_clock: MockClock) -> None:
    """While pages of a disk are laundered whose host does not answer, others report no hole."""
    connection, _other = socket.socketpair()
    process = Launderer.__new__(Launderer)
    process.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    laundering = Laundering(process)
    laundering.connect(connection.fileno())
    with connection, _other, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(laundering.launder, exported_disk())
            await wait_all_tasks_blocked()
            start = trio.current_time()
            assert await laundering.launder(exported_disk(), lock_seconds=1) is False
            assert trio.current_time() - start == 1
            laundering.stop()
    assert autojump_clock.autojump_threshold == 0


@pytest.mark.parametrize(
    ("release", "is_written"),
    [
        ("6.16.0-rc1", True),
        ("6.18.44+deb13-amd64", True),
        ("10.0", True),
        ("6.15.9", False),
        ("5.14.0-503.el9.x86_64", False),
        ("unknown", False),
    ],
)
async def test_requests_for_other_disks_make_no_page_dirty(
    release: str,
    is_written: bool,  # noqa: FBT001  a parameter of the test
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From Linux 6.16 on, laundering succeeds while the kernel always has a request.

    Older kernels may have sent pages before, so there the server waits for a pause, in vain.
    """
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    connection, other = socket.socketpair()
    other.send(b"a request")
    process = Launderer.__new__(Launderer)
    process.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    laundering = Laundering(process)
    laundering.connect(connection.fileno())
    with connection, other, theirs:
        theirs.send(ANSWER.pack(0))  # read after the notification was sent
        assert await laundering.launder(exported_disk()) is is_written
        laundering.stop()


def test_the_end_of_the_launderer_needs_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server waits for the end of the launderer although it has no free descriptor."""

    def fail(*_arguments: object, **_options: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    launderer = Launderer()
    launderer.stop()
    with monkeypatch.context() as patched:
        for name in ("open", "pidfd_open", "pipe", "dup"):
            patched.setattr(os, name, fail)
        assert launderer.wait()
    with pytest.raises(ChildProcessError):
        os.waitpid(launderer.pid, 0)
    assert launderer.wait()


def test_a_launderer_without_a_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host refuses the thread, the launderer fails as with any other refusal."""
    connection, other = socket.socketpair()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 0)
    monkeypatch.setattr(os, "open", lambda *_: os.dup(other.fileno()))
    with connection, other, ours, theirs:
        socket.send_fds(ours, [b"c"], [connection.fileno()])
        with pytest.raises(OSError, match="cannot start a thread"):
            run_without(CLONE3, lambda: _serve(theirs))
