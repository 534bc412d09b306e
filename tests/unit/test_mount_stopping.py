"""What a mount says when it is told to end while it is in use."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from qedfuse.disk import compaction
from qedfuse.errors import HostError
from qedfuse.mount import stopping
from qedfuse.mount.stopping import Stopper
from qedfuse.mount.unmount import BusyError
from tests.support.disks import build_image, inspect_image, opened, pattern
from tests.support.hostfiles import FailingFile, MemoryFile
from tests.unit.test_autocompact import GIVEN_UP, full, give_up

if TYPE_CHECKING:
    from qedfuse.mount.operations import Operations

CLUSTER = 4096


async def end_while_in_use(monkeypatch: pytest.MonkeyPatch, *disks: object) -> None:
    """Tell a mount of some disks to end; it is in use at the first try, and not at the second."""
    busy = [BusyError("in use")]

    def unmount(_mountpoint: str) -> None:
        if busy:
            raise busy.pop()

    monkeypatch.setattr(stopping, "unmount", unmount)
    monkeypatch.setattr(stopping, "sync_mount", lambda _mountpoint: None)
    monkeypatch.setattr(Stopper, "_is_ours", lambda _self: True)
    views = {number: SimpleNamespace(disk=disk, writers=1) for number, disk in enumerate(disks)}
    stopper = Stopper()
    operations = SimpleNamespace(views=views, write_back=None, opened=1, released=None)
    stopper.mounted(cast("Operations", operations), "/mnt", "0:99")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stopper._unmount_when_idle, "SIGTERM")
        await trio.testing.wait_all_tasks_blocked()
        stopper._wake()
    assert not busy


@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; it goes on")
async def test_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so when it is true."""
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 1))
        assert file.counts["datasync"] == 0
        await end_while_in_use(monkeypatch, disk)
        assert file.counts["datasync"] == 1


@pytest.mark.expect_log("cannot make everything durable: image: datasync: Input/output error")
@pytest.mark.expect_log("SIGTERM: still in use: not everything is durable; it goes on")
@pytest.mark.expect_log("the disk is read-only from now on")
@pytest.mark.parametrize("failed", ["before", "now"])
async def test_not_durable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failed: str
) -> None:
    """A disk that failed, then or earlier, is never called durable; the others are flushed."""
    inner = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    file, other = FailingFile(inner), MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    failing = opened(file)
    async with opened(other) as second:
        await second.write(0, pattern(CLUSTER, 1))
        disk = await failing.__aenter__()
        await disk.write(0, pattern(CLUSTER, 1))
        file.fail("datasync")
        if failed == "before":
            with pytest.raises(HostError):
                await disk.flush()
        await end_while_in_use(monkeypatch, disk, second)
        assert other.counts["datasync"] == 1
        with pytest.raises(HostError):
            await failing.__aexit__(None, None, None)
    assert "everything is durable now" not in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_compaction(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the mount is gone: what was moved is cut off, and the close goes on."""
    monkeypatch.setattr(compaction, "_QUICK_BATCH_BYTES", CLUSTER)
    inner = MemoryFile(full())
    file = FailingFile(inner)
    async with trio.open_nursery() as nursery:
        stopper = Stopper()
        await nursery.start(stopper.run, nursery.cancel_scope)
        async with opened(file) as disk:
            await give_up(disk)
            await disk.flush()
            stopper.closing([disk])
            gate = file.hold("write", 7)

            async def send() -> None:
                await gate.reached.wait()
                signal.raise_signal(number)
                await trio.testing.wait_all_tasks_blocked()
                gate.open()

            nursery.start_soon(send)
        nursery.cancel_scope.cancel()
    assert not stopper.interrupted
    assert inner.closed
    found = inspect_image(inner.content)
    assert found.errors == ()
    assert 0 < found.leaks < len(GIVEN_UP)
