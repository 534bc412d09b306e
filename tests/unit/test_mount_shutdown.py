"""Signals: unmounting when idle or by force, and what is reported about durability."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal
import threading
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pyfuse3
import pytest
import trio

from qedfuse.disk.maintenance import datacompaction
from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount import durability, shutdown
from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
from qedfuse.mount.process import unmounter
from qedfuse.mount.process.signals import SIGNALS, SignalDispatcher
from qedfuse.mount.process.unmounter import _CONNECT, DirectUnmounter, HelperUnmounter
from qedfuse.mount.shutdown import Shutdown
from qedfuse.mount.system.unmount import BusyError
from tests.support.compactible import DISCARDED, discard_some, full_image
from tests.support.disks import build_image, inspect_image, opened, pattern
from tests.support.hostfiles import FailingFile, MemoryFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from trio.testing import MockClock

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.fuse.laundering import Laundering

CLUSTER = 4096


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Restore the handlers that `SignalDispatcher.run` replaces until the process exits."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def export(*disks: object) -> ExportedDisks:
    """Export disks, each with one open handle that may write."""
    exports = ExportedDisks(
        ExportedDisk(cast("Disk", disk), b"%d.raw" % number, number)
        for number, disk in enumerate(disks, 2)
    )
    for exported in exports:
        exports.handle_opened(exported, writer=True)
    return exports


class Kernel:
    """Stands for `Laundering`.

    Attributes:
        laundered: The disks that are laundered.
    """

    def __init__(self, *, writes_back: bool) -> None:
        """Write dirty pages back, or not."""
        self.laundered: list[ExportedDisk] = []
        self._writes_back = writes_back

    async def launder(self, exported: ExportedDisk) -> bool:
        """Return whether the dirty pages of a disk were written back."""
        self.laundered.append(exported)
        return self._writes_back


async def call_directly(
    function: Callable[..., object], *arguments: object, abandon_on_cancel: bool
) -> object:
    """Stand for `run_in_thread`: the mock clock does not jump, and no other task runs meanwhile."""
    assert abandon_on_cancel
    return function(*arguments)


async def end_while_in_use(
    monkeypatch: pytest.MonkeyPatch,
    *disks: object,
    kernel: Kernel | None = None,
    before: Sequence[Exception] = (),
    sync_error: OSError | None = None,
) -> None:
    """Signal a mount of some disks that is in use until everything has been flushed.

    The first attempts to unmount fail with the exceptions ``before``, and every syncfs(2) fails
    with ``sync_error``.
    """
    busy = [BusyError("in use"), *reversed(before)]
    flushed, flush = trio.Event(), Shutdown._flush

    def unmount(_mountpoint: str, *, lazy: bool) -> None:
        assert not lazy
        if busy:
            raise busy.pop()

    def sync(_mountpoint: str) -> None:
        if sync_error is not None:
            raise sync_error

    async def flush_and_notify(self: Shutdown) -> bool:
        try:
            return await flush(self)
        finally:
            flushed.set()

    # The mock clock jumps while a worker thread runs.
    monkeypatch.setattr(shutdown, "_SLOW_FLUSH_SECONDS", math.inf)
    monkeypatch.setattr(unmounter, "unmount", unmount)
    monkeypatch.setattr(Shutdown, "_flush", flush_and_notify)
    monkeypatch.setattr(durability, "sync_mount", sync)
    monkeypatch.setattr(Shutdown, "_is_mounted", lambda _self: True)
    monkeypatch.setattr(unmounter, "describe_visible_mounts", lambda _device: None)
    async with trio.open_nursery() as nursery:
        exports = export(*disks)
        laundering = cast("Laundering | None", kernel)
        Shutdown(
            exports, laundering, "/mnt", "0:99", DirectUnmounter("/mnt"), list, nursery
        ).receive("SIGTERM")
        # A time limit here would end the wait with the mock clock, which jumps to the
        # next deadline while a worker thread runs.
        await flushed.wait()
        for exported in exports:
            exports.handle_closed(exported, writer=True)
    assert not busy


@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; the mount goes on")
async def test_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says that all is durable after a flush of every disk."""
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 1))
        assert file.counts["datasync"] == 0
        await end_while_in_use(monkeypatch, disk)
        assert file.counts["datasync"] == 1


@pytest.mark.expect_log("SIGTERM: [Errno 24] Too many open files")
@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; a second SIGTERM or")
async def test_durable_after_a_failed_attempt(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """A mount that is in use is flushed also if an attempt to unmount failed before."""
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 1))
        lack = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(2)]
        await end_while_in_use(monkeypatch, disk, before=lack)
        assert file.counts["datasync"] == 1


@pytest.mark.expect_log("SIGTERM: fusermount3 is not installed")
@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; a second SIGTERM or")
async def test_durable_although_the_mount_cannot_be_unmounted(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """A mount in use is flushed also if every attempt to unmount fails.

    The log does not claim that the last close ends the mount.
    """
    msg = "fusermount3 is not installed"
    attempts = 0

    def unmount(_mountpoint: str, *, lazy: bool) -> None:
        nonlocal attempts
        assert not lazy
        attempts += 1
        if attempts < 3:
            raise PrivilegeError(msg)
        assert file.counts["datasync"] == 1

    monkeypatch.setattr(shutdown, "_SLOW_FLUSH_SECONDS", math.inf)
    monkeypatch.setattr(shutdown, "run_in_thread", call_directly)
    monkeypatch.setattr(unmounter, "unmount", unmount)
    monkeypatch.setattr(durability, "sync_mount", lambda _mountpoint: None)
    monkeypatch.setattr(Shutdown, "_is_mounted", lambda _self: True)
    monkeypatch.setattr(unmounter, "describe_visible_mounts", lambda _device: None)
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk, trio.open_nursery() as nursery:
        await disk.write(0, pattern(CLUSTER, 1))
        exports = export(disk)
        Shutdown(exports, None, "/mnt", "0:99", DirectUnmounter("/mnt"), list, nursery).receive(
            "SIGTERM"
        )
        await trio.testing.wait_all_tasks_blocked()
        for exported in exports:
            exports.handle_closed(exported, writer=True)
    assert attempts == 3


@pytest.mark.expect_log("cannot start a thread")
@pytest.mark.expect_log("SIGTERM: still in use")
@pytest.mark.parametrize("refusal", [RuntimeError("can't start new thread"), MemoryError()])
async def test_in_use_without_threads(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
    refusal: Exception,
) -> None:
    """A mount that is in use is flushed also if no thread could be started to unmount it."""
    refused, start = [refusal, refusal], threading.Thread.start

    def refuse_first(thread: threading.Thread) -> None:
        if refused:
            raise refused.pop()
        start(thread)

    cache = trio._core._thread_cache
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 1))
        monkeypatch.setattr(cache, "THREAD_CACHE", cache.ThreadCache())
        monkeypatch.setattr(threading.Thread, "start", refuse_first)
        await end_while_in_use(monkeypatch, disk)
        assert not refused
        assert file.counts["datasync"] == 1


@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; the mount goes on")
async def test_durable_with_pages_that_are_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says that all is durable if the kernel has written its dirty pages back."""
    async with opened(MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))) as disk:
        kernel = Kernel(writes_back=True)
        await end_while_in_use(monkeypatch, disk, kernel=kernel)
        assert len(kernel.laundered) == 1


@pytest.mark.parametrize("hanging", ["syncfs", "launder", "flush"])
async def test_a_disk_is_flushed_while_another_one_hangs(
    hanging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server has received for a disk is made durable, whatever another disk waits for."""
    released = threading.Event()
    flushed: list[int] = []

    class Hanging(Kernel):
        async def launder(self, exported: ExportedDisk) -> bool:
            if hanging == "launder":
                await trio.sleep_forever()
            return await super().launder(exported)

    def sync(_mountpoint: str) -> None:
        if hanging == "syncfs":
            released.wait()

    async def flush(number: int) -> None:
        if hanging == "flush" and number == 0:
            await trio.sleep_forever()
        flushed.append(number)

    monkeypatch.setattr(durability, "sync_mount", sync)
    monkeypatch.setattr(Shutdown, "_is_mounted", lambda _self: True)
    disks = [SimpleNamespace(flush=partial(flush, number)) for number in range(2)]
    try:
        async with trio.open_nursery() as nursery:
            ending = Shutdown(
                *(export(*disks), cast("Laundering", Hanging(writes_back=True)), "/mnt", "0:99"),
                *(DirectUnmounter("/mnt"), list, nursery),
            )
            nursery.start_soon(ending._flush)
            await trio.testing.wait_all_tasks_blocked()
            assert 1 in flushed
            nursery.cancel_scope.cancel()
    finally:
        released.set()


@pytest.mark.expect_log("; a second SIGTERM or SIGINT ends the ")
@pytest.mark.parametrize("is_busy", [True, False])
async def test_a_host_that_does_not_answer_keeps_no_message_from_the_log(
    is_busy: bool,  # noqa: FBT001  a parameter of the test
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """While a flush waits for a host, the log names what is in use or where it is mounted."""

    def unmount(_mountpoint: str, *, lazy: bool) -> None:
        assert not lazy
        if is_busy:
            msg = "in use"
            raise BusyError(msg)

    async def flush(_self: Shutdown) -> NoReturn:
        await trio.sleep_forever()

    monkeypatch.setattr(unmounter, "unmount", unmount)
    monkeypatch.setattr(Shutdown, "_flush", flush)
    monkeypatch.setattr(Shutdown, "_is_mounted", lambda _self: True)
    monkeypatch.setattr(unmounter, "describe_visible_mounts", lambda _device: "still mounted at /b")
    monkeypatch.setattr(shutdown, "run_in_thread", call_directly)
    async with trio.open_nursery() as nursery:
        Shutdown(export(), None, "/mnt", "0:99", DirectUnmounter("/mnt"), list, nursery).receive(
            "SIGTERM"
        )
        await trio.sleep(60)
        state = "still in use: " if is_busy else "unmounted here, but still mounted at /b; "
        assert f"SIGTERM: {state}not everything is durable yet; the " in caplog.text
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; the mount goes on")
async def test_durable_although_pages_of_another_disk_are_sent_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk is laundered again after the kernel has sent the pages of the other disks."""
    is_sent = trio.Event()

    class OldKernel(Kernel):
        async def launder(self, exported: ExportedDisk) -> bool:
            self.laundered.append(exported)
            if exported.inode == 2:
                if not is_sent.is_set():
                    is_refused.set()
                    return False
            else:
                await is_refused.wait()
                is_sent.set()
            return True

    is_refused = trio.Event()
    async with (
        opened(MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))) as first,
        opened(MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))) as second,
    ):
        kernel = OldKernel(writes_back=True)
        await end_while_in_use(monkeypatch, first, second, kernel=kernel)
    assert sorted(exported.inode for exported in kernel.laundered) == [2, 2, 3]


async def test_pages_that_the_kernel_sends_while_another_disk_is_laundered_are_flushed(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """What syncfs(2) makes the kernel send becomes durable while laundering waits for its turn."""
    lock, has_begun = trio.Lock(), trio.Event()
    received: list[int] = []

    class OneAtATime(Kernel):
        async def launder(self, exported: ExportedDisk) -> bool:
            async with lock:  # as in `Laundering`: the first disk never releases it
                self.laundered.append(exported)
                has_begun.set()
                return await trio.sleep_forever()

    async def flush(number: int) -> None:
        if received:
            flushed[number].set()

    monkeypatch.setattr(Shutdown, "_is_mounted", lambda _self: False)
    flushed = [trio.Event() for _ in range(2)]
    disks = [SimpleNamespace(flush=partial(flush, number)) for number in range(2)]
    async with trio.open_nursery() as nursery:
        ending = Shutdown(
            *(export(*disks), cast("Laundering", OneAtATime(writes_back=True)), "/mnt", "0:99"),
            *(DirectUnmounter("/mnt"), list, nursery),
        )
        nursery.start_soon(ending._flush)
        await has_begun.wait()
        received.append(1)  # the kernel sends pages of both disks
        with trio.fail_after(60):
            for event in flushed:
                await event.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log("SIGTERM: still in use: everything is durable now; the mount goes on")
async def test_durable_in_a_mount_that_excludes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that may not open its mountpoint launders, and makes everything durable so."""
    refusal = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/mnt")
    file = MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 1))
        kernel = Kernel(writes_back=True)
        await end_while_in_use(monkeypatch, disk, kernel=kernel, sync_error=refusal)
        assert len(kernel.laundered) == 1
        assert file.counts["datasync"] == 1


@pytest.mark.expect_log("/mnt: cannot make everything durable: [Errno 5] Input/output error")
@pytest.mark.expect_log("SIGTERM: still in use: not everything is durable; the mount goes on")
async def test_not_durable_if_the_kernel_has_lost_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error of syncfs(2) is reported, because pages may be lost."""
    lost = OSError(errno.EIO, os.strerror(errno.EIO))
    async with opened(MemoryFile(build_image(8 * CLUSTER, {0: b"x"}))) as disk:
        kernel = Kernel(writes_back=True)
        await end_while_in_use(monkeypatch, disk, kernel=kernel, sync_error=lost)
        assert len(kernel.laundered) == 1


@pytest.mark.expect_log("everything durable: image: the kernel may have data that it has not writ")
@pytest.mark.expect_log("SIGTERM: still in use: not everything is durable; the mount goes on")
async def test_not_durable_with_dirty_pages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the kernel may have dirty pages left, the log does not claim durability.

    All disks are laundered and flushed nevertheless.
    """
    files = [MemoryFile(build_image(8 * CLUSTER, {0: b"x"})) for _ in range(2)]
    async with opened(files[0]) as first, opened(files[1]) as second:
        for disk in (first, second):
            await disk.write(0, pattern(CLUSTER, 1))
        kernel = Kernel(writes_back=False)
        await end_while_in_use(monkeypatch, first, second, kernel=kernel)
        assert set(kernel.laundered[:2]) == set(kernel.laundered[2:])
        assert len(kernel.laundered) == 4
        assert [file.counts["datasync"] for file in files] == [1, 1]
    assert "everything is durable now" not in caplog.text


@pytest.mark.expect_log("cannot make everything durable: image: datasync: Input/output error")
@pytest.mark.expect_log("SIGTERM: still in use: not everything is durable; the mount goes on")
@pytest.mark.expect_log("the disk is read-only from now on")
@pytest.mark.parametrize("failed", ["before", "now"])
async def test_not_durable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failed: str
) -> None:
    """If a disk fails, now or before, the log does not claim durability; others are flushed."""
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
    """After the mount is gone a signal ends the compaction; the disk is closed cleanly."""
    monkeypatch.setattr(datacompaction, "_LIMITED_BATCH_BYTES", CLUSTER)
    inner = MemoryFile(full_image())
    file = FailingFile(inner)
    async with trio.open_nursery() as nursery:
        interrupted: list[str] = []
        signals = SignalDispatcher(interrupted.append)
        await nursery.start(signals.run)
        async with opened(file) as disk:
            await discard_some(disk)
            await disk.flush()
            signals.handle_with(lambda _name: disk.stop_compacting())
            held = file.hold("write", 7)

            async def send() -> None:
                await held.reached.wait()
                signal.raise_signal(number)
                await trio.testing.wait_all_tasks_blocked()
                held.release()

            nursery.start_soon(send)
        nursery.cancel_scope.cancel()
    assert not interrupted
    assert inner.closed
    found = inspect_image(inner.content)
    assert found.errors == ()
    assert 0 < found.leaks < len(DISCARDED)


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
async def test_a_signal_that_is_ignored_stays_ignored(ignored: signal.Signals) -> None:
    """SIGHUP stays ignored as nohup(1) sets it, and SIGINT as a shell sets it in the background."""
    signal.signal(ignored, signal.SIG_IGN)
    async with trio.open_nursery() as nursery:
        signals = SignalDispatcher(lambda _name: nursery.cancel_scope.cancel())
        await nursery.start(signals.run)
        assert signal.getsignal(ignored) == signal.SIG_IGN
        signal.raise_signal(ignored)
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.cancel_scope.cancel_called
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(60)  # it is cancelled
    assert nursery.cancel_scope.cancel_called


async def test_sigterm_is_received_even_if_it_is_ignored() -> None:
    """A mount that ignored SIGTERM would be ended by SIGKILL, which loses data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    received: list[str] = []
    async with trio.open_nursery() as nursery:
        signals = SignalDispatcher(received.append)
        await nursery.start(signals.run)
        signal.raise_signal(signal.SIGTERM)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert received == ["SIGTERM"]


@pytest.mark.expect_log("SIGTERM: [Errno 24] Too many open files")
@pytest.mark.expect_log("SIGTERM: cannot find where else the disks are mounted: [Errno 24] Too")
async def test_a_lack_of_descriptors_does_not_end_the_server(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """The mount table is read again a second later, and the mount is unmounted then."""
    lack = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]
    entry = SimpleNamespace(device="0:99")
    unmounted: list[str] = []

    def find_mount(_mountpoint: str) -> object:
        if not unmounted and lack:
            raise lack.pop()
        return entry

    def fail(_device: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shutdown, "find_mount", find_mount)
    monkeypatch.setattr(unmounter, "unmount", lambda path, **_flags: unmounted.append(path))
    monkeypatch.setattr(unmounter, "describe_visible_mounts", fail)
    async with trio.open_nursery() as nursery:
        Shutdown(export(), None, "/mnt", "0:99", DirectUnmounter("/mnt"), list, nursery).receive(
            "SIGTERM"
        )
    assert unmounted == ["/mnt"]
    assert not lack


@pytest.mark.parametrize(
    ("names", "forced_by"),
    [
        (["SIGTERM", "SIGHUP", "SIGHUP"], None),
        (["SIGHUP", "SIGTERM"], None),
        (["SIGHUP", "SIGHUP"], None),
        (["SIGINT", "SIGHUP"], None),
        (["SIGTERM", "SIGTERM", "SIGTERM"], 1),
        (["SIGINT", "SIGTERM"], 1),
        (["SIGTERM", "SIGHUP", "SIGTERM"], 2),
        (["SIGHUP", "SIGTERM", "SIGINT", "SIGINT"], 2),
    ],
)
def test_a_hangup_never_forces_the_end(names: list[str], forced_by: int | None) -> None:
    """Only SIGTERM and SIGINT count for the end by force; any signal starts the unmount."""
    started: list[str] = []
    nursery = SimpleNamespace(start_soon=lambda task, *_args: started.append(task.__name__))
    ending = Shutdown(
        *(export(), None, "/mnt", "0:99", DirectUnmounter("/mnt"), list),
        cast("trio.Nursery", nursery),
    )
    expected: list[str] = []
    for number, name in enumerate(names):
        ending.receive(name)
        if number == 0:
            expected.append("_unmount_when_idle")
        if number == forced_by:
            expected.append("_force")
        assert started == expected


@pytest.mark.expect_log("second signal: ending while in use")
@pytest.mark.expect_log("/mnt: ended by force before everything was durable")
@pytest.mark.expect_log("/mnt: cannot end the connection: [Errno 24] Too many open files")
async def test_a_forced_unmount_that_loses_data_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """A flush that exceeds its time limit makes the forced unmount a HostError."""
    terminated: list[bool] = []

    async def never_flush() -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(shutdown, "find_mount", lambda _mountpoint: None)
    monkeypatch.setattr(pyfuse3, "terminate", lambda: terminated.append(True))

    def disconnect() -> None:
        assert terminated
        disconnected.append(True)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    disconnected: list[bool] = []
    async with trio.open_nursery() as nursery:
        stopped: list[bool] = []
        disk = SimpleNamespace(flush=never_flush, stop_fetching=lambda: stopped.append(True))
        disks = export(disk)
        ending = Shutdown(disks, None, "/mnt", "0:99", DirectUnmounter("/mnt"), disconnect, nursery)
        ending._is_ending, ending._requests_to_end = True, 1
        ending.receive("SIGTERM")
    assert disconnected
    assert stopped
    assert isinstance(ending.failure, HostError)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("message", [_CONNECT, b"x"])
def test_the_helper_unmounts_for_no_other_request(
    message: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a system log the request to connect to it is refused, and so is an unknown one."""
    unmounted = tmp_path / "unmounted"
    monkeypatch.setattr(unmounter, "unmount", lambda *_path, **_flags: unmounted.touch())
    with HelperUnmounter("/mnt", None) as helper:
        with pytest.raises(HostError, match="cannot carry out the request"):
            helper._ask(message)
        assert not unmounted.exists()
        helper.unmount()
        assert unmounted.exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_request_that_lost_its_descriptor_does_not_end_the_helper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The request fails, and a later one is carried out when descriptors are free again."""
    unmounted = tmp_path / "unmounted"
    monkeypatch.setattr(unmounter, "unmount", lambda *_path, **_flags: unmounted.touch())
    with HelperUnmounter("/mnt", None) as helper:
        with pytest.raises(HostError, match="cannot carry out the request"):
            helper._ask(b"x")  # the helper has started, and has closed its other descriptors
        limits = resource.prlimit(helper.pid, resource.RLIMIT_NOFILE)
        # The lowest free descriptor is 3, which is over the limit.
        resource.prlimit(helper.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(HostError, match=r"helper process\): Broken pipe"):
            helper.unmount()
        assert not unmounted.exists()
        resource.prlimit(helper.pid, resource.RLIMIT_NOFILE, limits)
        helper.unmount()
        assert unmounted.exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_reply_that_lost_its_descriptor_is_a_lack_of_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log handler that connects through the helper gets an OSError."""
    with HelperUnmounter("/mnt", None) as helper:
        monkeypatch.setattr(helper, "_ask", lambda _request: (None, []))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            helper._connect_to_log_daemon()
