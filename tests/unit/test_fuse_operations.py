"""FUSE INIT, the options for libfuse, and the handlers of requests, without a kernel."""

from __future__ import annotations

import errno
import logging
import os
import struct
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pyfuse3
import pytest
import trio
import trio.testing
from pyfuse3 import ROOT_INODE, FUSEError

from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.window import DiskWindow
from qedfuse.errors import (
    CorruptImageError,
    ForeignError,
    FuseError,
    HostError,
    MountpointError,
    ObjectChangedError,
    PrivilegeError,
    RemoteError,
)
from qedfuse.mount.fuse import attach
from qedfuse.mount.fuse.attach import _explain, libfuse_options
from qedfuse.mount.fuse.attributes import set_times
from qedfuse.mount.fuse.blocksinvalidator import MIN_INTERVAL_SECONDS, BlocksInvalidator
from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
from qedfuse.mount.fuse.fallocate import FallocateLseek
from qedfuse.mount.fuse.fuseinit import mask_request, patch_reply
from qedfuse.mount.fuse.handles import HANDLE_DIRECT, HANDLE_WRITER
from qedfuse.mount.fuse.operations import Operations
from qedfuse.mount.fuse.partitionfiles import PartitionFiles
from qedfuse.mount.fuse.sizefixup import SizeFixup
from qedfuse.mount.fuse.truncation import Truncation
from qedfuse.mount.optionparser import parse_options
from qedfuse.mount.options import MountOptions
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from pyfuse3 import ReaddirToken, RequestContext, SetattrFields
    from trio.testing import MockClock

    from qedfuse.disk.disk import Disk

INIT = struct.pack("=IIQQIIII" + "IIII", 56, 26, 1, 0, 0, 0, 0, 0, 7, 40, 1 << 17, 0xFF)


class Broken:
    """A disk that fails at everything with one exception."""

    size = 4096
    writable = True
    failure: str | None = None
    name = "vm.qed"

    def __init__(self, error: Exception) -> None:
        """Fail with ``error``."""
        self._error = error

    def try_read(self, _start: int, _length: int) -> None:
        """Return None, so that the slow path is taken."""

    async def read(self, _start: int, _length: int) -> bytes:
        """Fail."""
        raise self._error

    def try_write(self, _start: int, _data: bytes) -> bool:
        """Return False, so that the slow path is taken."""
        return False

    async def write(self, _start: int, _data: bytes) -> int:
        """Fail."""
        raise self._error

    async def flush(self) -> None:
        """Do nothing."""


async def drop_pages(_exported: ExportedDisk) -> bool:
    """Report that the kernel has dropped its pages."""
    return True


def export(*disks: object) -> ExportedDisks:
    """Export disks from inode 2 of a directory on."""
    return ExportedDisks(
        ExportedDisk(cast("Disk", disk), b"vm%d.raw" % number if number else b"vm.raw", 2 + number)
        for number, disk in enumerate(disks)
    )


def operations(disks: ExportedDisks, options: MountOptions | None = None) -> Operations:
    """Make the handlers of requests for disks in a directory."""
    chosen = options or MountOptions()
    truncation = Truncation(chosen, drop_pages)
    size_fixup = SizeFixup("/mnt", is_directory=True)
    files = PartitionFiles(disks, drop_pages, lambda: None)
    return Operations(disks, chosen, truncation, size_fixup, files, is_directory=True)


class Context:
    """The context of a request."""

    def __init__(self, uid: int) -> None:
        """Make a request of user ``uid``."""
        self.uid = uid


def context(uid: int = 0) -> RequestContext:
    """Return the context of a request of user ``uid``."""
    return cast("RequestContext", Context(uid))


def test_a_feature_is_masked_and_the_rest_is_passed_on() -> None:
    """One feature bit of the kernel's INIT request is cleared, and the rest is unchanged."""
    changed = mask_request(INIT + b"more", 8)
    assert changed == INIT[:52] + struct.pack("=I", 0xF7) + b"more"


@pytest.mark.parametrize("message", [b"", INIT[:50], b"\0" * 100])
def test_a_message_other_than_init_is_refused(message: bytes) -> None:
    """Only an INIT request is masked."""
    with pytest.raises(FuseError, match="expected FUSE_INIT"):
        mask_request(message, 8)


REPLY = struct.pack("=IiQ" + "IIIIHHII", 80, 0, 2, 7, 31, 1 << 17, 0xF7, 0, 0, 1 << 20, 1)
REPLY += bytes(80 - len(REPLY))


@pytest.mark.parametrize(
    ("readahead", "found"),
    [(None, 1 << 17), (1 << 20, 1 << 17), (1 << 16, 1 << 16), (0, 0)],
)
def test_the_init_reply_of_libfuse_is_completed(readahead: int | None, found: int) -> None:
    """It gets max_background, time_gran and less read-ahead if wanted; the rest is unchanged."""
    changed = patch_reply(REPLY, readahead)
    assert struct.unpack_from("=IIIIHHII", changed, 16) == (
        *(7, 31, found, 0xF7, 64, 48),
        *(1 << 20, 100_000_000),
    )
    assert (changed[:16], changed[44:]) == (REPLY[:16], REPLY[44:])


@pytest.mark.parametrize(("disks", "background"), [(1, 64), (2, 4096), (100, 4096)])
def test_several_disks_get_more_background_requests(disks: int, background: int) -> None:
    """One disk of several must not reach the limit, which counts the requests of all disks."""
    changed = patch_reply(REPLY, None, disks)
    assert struct.unpack_from("=HH", changed, 32) == (background, background * 3 // 4)


def test_an_init_reply_with_an_error_is_unchanged() -> None:
    """An error, and the reply to a kernel too old or too new, have no such fields."""
    for reply in (struct.pack("=IiQ", 16, -errno.EPROTO, 2), REPLY[:24]):
        assert patch_reply(reply, 0) == reply


def test_descriptors_that_threads_close_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor may be closed after it was listed and before it is read."""
    monkeypatch.setattr(attach, "open_descriptors", lambda: {-1})
    assert attach._fuse_descriptors() == set()


def test_options_for_libfuse() -> None:
    """Nosuid and nodev are set whatever the user says; commas in the source are escaped."""
    options = parse_options(["ro,allow_root,noatime,dev,suid"])
    assert libfuse_options(options, "/a,b\\ü\n.qed") == {
        "fsname=/a\\,b\\\\ü\n.qed",
        "subtype=qedfuse",
        "default_permissions",
        "nosuid",
        "nodev",
        "ro",
        "noatime",
        "allow_other",
    }


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("fusermount3: mount failed: Operation not permitted", PrivilegeError),
        ("fuse: bad mount point `/x': Transport endpoint is not connected", MountpointError),
        ("fuse: mount failed: Invalid argument", FuseError),
    ],
)
def test_messages_of_libfuse_become_errors(said: str, kind: type[Exception]) -> None:
    """The class, which decides the exit code, follows from the message, which is kept."""
    error = _explain("/mnt", said)
    assert type(error) is kind
    assert str(error) == f"/mnt: cannot mount: {said}"


def test_words_in_a_path_do_not_choose_the_error() -> None:
    """The name of a mountpoint may look like a reason."""
    name = "/Permission denied/mountpoint"
    assert type(_explain(name, f"fuse: {name}: Invalid argument")) is FuseError


async def test_an_expected_failure_is_answered_and_logged_once(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """The kernel gets the errno of the error, and the log one line for repeated errors."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed: bad table"))
    handlers = operations(export(Broken(CorruptImageError("vm.qed: bad table"))))
    for _ in range(2):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await handlers.read(2, 0, 512)
        assert caught.value.errno == errno.EIO
    assert [record.getMessage() for record in caplog.records] == ["vm.qed: bad table"]


async def test_a_bug_is_answered_with_eio_and_logged_with_its_trace(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """No exception reaches pyfuse3, which would end the mount."""
    request.node.add_marker(pytest.mark.expect_log("internal error in read"))
    handlers = operations(export(Broken(ZeroDivisionError())))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.read(2, 0, 512)
    assert caught.value.errno == errno.EIO
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].exc_info is not None


class NamedBroken(Broken):
    """A broken disk with a name, whose error can be changed."""

    name = "/vm.qed"

    def fail(self, message: str) -> None:
        """Fail with ``message`` from now on."""
        self._error = CorruptImageError(message)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT, os.O_DSYNC, os.O_SYNC | os.O_DIRECT])
async def test_errors_are_counted_for_the_disk_whatever_the_handle(
    flags: int, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """The summary names the disk, and not the mount, for handles with any flags of open(2)."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed"))
    disk = NamedBroken(CorruptImageError("vm.qed: bad table"))
    for options in (MountOptions(), MountOptions(direct_io=True)):
        handlers = operations(export(disk), options)
        opened = await handlers.open(2, os.O_RDWR | flags, context())
        for _ in range(2):
            with pytest.raises(pyfuse3.FUSEError):
                await handlers.read(opened.fh, 0, 512)
        caplog.clear()
        handlers.errors._summarize()
        assert [record.getMessage() for record in caplog.records] == [
            f"{disk.name}: 1 more error not logged one by one, the last: vm.qed: bad table"
        ]


class Shrunk:
    """A disk on which a discard fails the test."""

    size = 8192

    async def discard(self, start: int, length: int) -> NoReturn:
        """Fail the test."""
        pytest.fail(f"{length} bytes from {start} on are discarded")


async def test_a_size_fixup_never_discards_data() -> None:
    """If the disk has grown since the fix-up read its size, the truncation is refused."""
    exported = ExportedDisk(cast("Disk", Shrunk()), b"vm.raw", 2, fixup_size=4096)
    truncation = Truncation(MountOptions(growable=True, truncate="zero"), drop_pages)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await truncation.set_size(exported, 4096)
    assert caught.value.errno == errno.EPERM


class Stored:
    """A disk with an image file of some blocks.

    Attributes:
        blocks: The ``st_blocks`` of the image file; None if fstat(2) fails.
        refusal: The error with which the host refuses the attributes; None if it does not.
    """

    size = 8192
    writable = True

    def __init__(self, blocks: int) -> None:
        """Take up some blocks."""
        self.blocks: int | None = blocks
        self.refusal: HostError | None = None

    def stored_blocks(self) -> int:
        """Return the blocks of the image file."""
        assert self.blocks is not None
        return self.blocks

    def fstat(self) -> SimpleNamespace:
        """Return the status of the image file."""
        if self.refusal is not None:
            raise self.refusal
        if self.blocks is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        times = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), 0)
        return SimpleNamespace(st_blocks=self.blocks, **times)


def to_set(*names: str) -> SetattrFields:
    """Return the fields of a SETATTR request that sets some attributes."""
    every = ("mode", "uid", "gid", "size", "atime", "mtime")
    return cast(
        "SetattrFields", SimpleNamespace(**{f"update_{name}": name in names for name in every})
    )


@pytest.mark.parametrize("name", ["mode", "uid", "gid", "size"])
async def test_a_refused_setattr_does_not_hide_a_wrong_st_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a change of attributes is refused, the next flush still corrects the kernel's st_blocks.

    The attributes that the kernel has cached are those of its last successful request.
    """
    forgotten: list[int] = []
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda inode, **_how: forgotten.append(inode))
    disk = Stored(8)
    disks = export(disk)
    handlers = operations(disks)
    (exported,) = disks
    await handlers.getattr(2, context())
    disk.blocks = 16
    wrong = pyfuse3.EntryAttributes()
    wrong.st_mode, wrong.st_uid, wrong.st_gid, wrong.st_size = 0o755, 7, 7, 4096
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.setattr(2, wrong, to_set(name), None, context())
    assert caught.value.errno == errno.EPERM
    now = 0.0
    invalidator = BlocksInvalidator(lambda: [exported], lambda: now)
    invalidator.flushed()
    assert forgotten == [2]
    await handlers.getattr(2, context())
    now = MIN_INTERVAL_SECONDS
    invalidator.flushed()
    assert forgotten == [2]


@pytest.mark.expect_log("internal error in readdir")
async def test_only_listed_disks_count_as_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing counts as a reply only for disks that fit, and only if no disk fails."""
    disks = export(*(Stored(8) for _ in range(3)))
    handlers = operations(disks)
    replies = iter([True, False, True])
    monkeypatch.setattr(pyfuse3, "readdir_reply", lambda *_arguments: next(replies))
    await handlers.readdir(1, 0, cast("ReaddirToken", None))
    assert [exported.cached_blocks for exported in disks] == [8, -1, -1]
    cast("Stored", disks.by_inode[4].disk).blocks = None
    with pytest.raises(pyfuse3.FUSEError):
        await handlers.readdir(1, 2, cast("ReaddirToken", None))
    assert [exported.cached_blocks for exported in disks] == [8, -1, -1]
    assert not list(replies)


@pytest.mark.expect_log("vm.qed: stat: Stale file handle")
async def test_a_listing_has_a_file_whose_attributes_the_host_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its attributes are the last known ones, if any, and the kernel must not cache them."""
    first, never = Stored(8), Stored(8)
    disks = export(first, never, Stored(24))
    handlers = operations(disks)
    await handlers.getattr(2, context())
    first.refusal = never.refusal = HostError("vm.qed: stat: Stale file handle", errno.ESTALE)
    listed: list[tuple[int, int, bool]] = []

    def reply(_token: object, _name: bytes, entry: pyfuse3.EntryAttributes, _next: int) -> bool:
        assert entry.st_size == Stored.size
        assert bool(entry.attr_timeout) == bool(entry.entry_timeout)
        listed.append((entry.st_ino, entry.st_blocks, bool(entry.attr_timeout)))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    await handlers.readdir(1, 0, cast("ReaddirToken", None))
    assert listed == [(2, 8, False), (3, 0, False), (4, 24, True)]
    assert (await handlers.getattr(1, context())).st_mtime_ns == 0
    with pytest.raises(FUSEError) as caught:
        await handlers.getattr(2, context())
    assert caught.value.errno == errno.ESTALE


@pytest.mark.expect_log("vm.qed: datasync: Input/output error")
async def test_fsyncdir_flushes_the_disks_after_one_that_fails() -> None:
    """An fsync of the directory reports the first error after it has flushed all disks."""
    flushed: list[int] = []

    class Flushing:
        def __init__(self, number: int) -> None:
            self.number = number

        async def flush(self) -> None:
            flushed.append(self.number)
            if self.number == 0:
                msg = "vm.qed: datasync: Input/output error"
                raise HostError(msg, errno.EIO)

    handlers = operations(export(Flushing(0), Flushing(1)))
    with pytest.raises(FUSEError) as caught:
        await handlers.fsyncdir(1, datasync=True)
    assert caught.value.errno == errno.EIO
    assert flushed == [0, 1]


async def test_a_listing_goes_on_after_the_last_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is removed between two replies of a listing makes it skip no other file."""
    disks = export(*(Stored(8) for _ in range(4)))
    handlers = operations(disks)
    listed: list[tuple[bytes, int]] = []

    def reply(_token: object, name: bytes, _attributes: object, next_id: int) -> bool:
        if len(listed) == 2:
            listed.append((b"", 0))
            return False
        listed.append((name, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    await handlers.readdir(1, 0, cast("ReaddirToken", None))
    first, second, _full = listed
    del disks.by_inode[first[1]]
    listed[:] = [first]
    await handlers.readdir(1, second[1], cast("ReaddirToken", None))
    assert [name for name, _ in listed[1:2]] == [b"vm2.raw"]


def test_a_loss_in_a_partition_that_was_removed_is_reported() -> None:
    """A removed file that has lost writes makes the whole disk count as one that has lost some."""
    disk = Stored(8)
    disks = export(disk)
    (whole,) = disks
    disks.set_partitions(whole, {b"vm.raw.p1": DiskWindow(cast("Disk", disk), 0, 512, "p1")})
    _, partition = disks
    partition.has_lost_data = True
    disks.set_partitions(whole, {})
    assert list(disks) == [whole]
    assert whole.has_lost_data


async def test_the_size_of_a_partition_that_was_removed_is_not_set() -> None:
    """Before a size is set, outdated partitions are read again, and a removed one is refused."""
    disks = export(Stored(8), Stored(8))
    handlers = operations(disks)

    async def refresh(exported: ExportedDisk) -> None:
        del disks.by_inode[exported.inode]

    handlers._partition_files.refresh_disk = refresh  # type: ignore[method-assign]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.setattr(3, pyfuse3.EntryAttributes(), to_set("size"), None, context())
    assert caught.value.errno == errno.ESTALE


async def test_errors_are_rate_limited_for_each_disk(
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
    request: pytest.FixtureRequest,
) -> None:
    """100 lines for each disk, then a line per minute with the number and the last error."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed"))
    disks = [NamedBroken(ValueError()), NamedBroken(ValueError())]
    handlers = operations(export(*disks))

    def logged() -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return texts

    async def fail(which: int, first: int, last: int) -> None:
        for number in range(first, last):
            disks[which].fail(f"/vm.qed: entry {number}")
            with pytest.raises(pyfuse3.FUSEError):
                await handlers.read(2 + which, 0, 512)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(handlers.errors.log_summaries)
        await fail(0, 0, 150)
        assert logged() == [f"/vm.qed: entry {number}" for number in range(100)]
        # Other disks have their own hundred.
        await fail(1, 0, 1)
        assert logged() == ["/vm.qed: entry 0"]
        await trio.sleep(59)
        assert logged() == []
        await trio.sleep(2)
        more = "/vm.qed: {} not logged one by one, the last: /vm.qed: entry {}"
        assert logged() == [more.format("50 more errors", 149)]
        # Repeats are counted as well, and nothing is logged while nothing fails.
        await trio.sleep(1000)
        assert logged() == []
        await fail(0, 7, 8)
        await trio.sleep(61)
        assert logged() == [more.format("1 more error", 7)]
        # Errors that no summary has reported yet are reported when the mount ends.
        await fail(0, 500, 502)
        nursery.cancel_scope.cancel()
    assert logged() == [more.format("2 more errors", 501)]
    assert autojump_clock.autojump_threshold == 0


async def test_bugs_are_rate_limited_too(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """A bug that every request meets is logged with one traceback."""
    request.node.add_marker(pytest.mark.expect_log("internal error in read"))
    handlers = operations(export(Broken(ZeroDivisionError())))
    for _ in range(3):
        with pytest.raises(pyfuse3.FUSEError):
            await handlers.read(2, 0, 512)
    assert len(caplog.records) == 1


async def test_a_failed_disk_is_reported_by_flush() -> None:
    """close(2) and fsync(2) report that writes may be lost."""
    disk = Broken(ValueError())
    handlers = operations(export(disk))
    await handlers.flush(2)
    disk.failure = "the host's disk broke"
    for call in (handlers.flush(2), handlers.fsync(2, True)):  # noqa: FBT003
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call
        assert caught.value.errno == errno.EIO


async def test_allow_root_refuses_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root and the owner are served, all other users get EACCES."""
    monkeypatch.setattr("os.getuid", lambda: 1000)
    image = qemu.create(tmp_path / "vm.qed", 4096)
    async with open_disk(str(image), OpenOptions()) as disk:
        handlers = operations(export(disk), parse_options(["allow_root"]))
        for uid in (0, 1000):
            assert (await handlers.lookup(1, b"vm.raw", context(uid))).st_ino == 2
        for call in (handlers.lookup(1, b"vm.raw", context(7)), handlers.opendir(1, context(7)),
                     handlers.getattr(2, context(7)), handlers.open(2, 0, context(7))):  # fmt: skip
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call
            assert caught.value.errno == errno.EACCES


async def test_allow_root_serves_descriptors_that_another_user_has_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an admitted open, requests that come with a handle are answered for every user.

    The kernel sends them with the user of the calling process, for example of a daemon that has
    opened the disk as root and dropped its privileges.
    """
    monkeypatch.setattr("os.getuid", lambda: 1000)
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    times = pyfuse3.EntryAttributes()
    times.st_atime_ns = times.st_mtime_ns = 1_000_000_000_000_000_000
    fields = to_set("atime", "mtime")
    async with open_disk(str(image), OpenOptions(writable=True)) as disk:
        handlers = operations(export(disk), parse_options(["allow_root"]))
        handle = (await handlers.open(2, os.O_RDWR, context(0))).fh
        assert (await handlers.setattr(2, times, fields, handle, context(7))).st_ino == 2
        assert image.stat().st_mtime_ns == times.st_mtime_ns
        assert (await handlers.getattr(2, context(7))).st_ino == 2
        for call in (
            handlers.setattr(2, times, fields, None, context(7)),
            handlers.getattr(1, context(7)),
        ):
            with pytest.raises(FUSEError) as caught:
                await call
            assert caught.value.errno == errno.EACCES
        await handlers.release(handle)
        with pytest.raises(FUSEError):
            await handlers.getattr(2, context(7))


async def test_handles_are_counted(tmp_path: Path) -> None:
    """The close of the last handle sets the event for which a shutdown waits."""
    image = qemu.create(tmp_path / "vm.qed", 4096)
    async with open_disk(str(image), OpenOptions()) as disk:
        disks = export(disk)
        handlers = operations(disks, parse_options(["ro"]))
        all_closed = disks.all_closed_event()
        first = await handlers.open(2, 0, context())
        second = await handlers.open(2, 0o40000, context())
        assert disks.open_handles == 2
        await handlers.release(second.fh)
        assert not all_closed.is_set()
        await handlers.release(first.fh)
        assert all_closed.is_set()
        assert disks.open_handles == 0
        assert not disks.all_closed_event().is_set()


@pytest.mark.expect_log("internal error in")
@pytest.mark.parametrize("name", ["read", "write"])
async def test_a_bug_on_the_fast_path_is_answered_too(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception on the fast path fails one request with EIO, and does not reach pyfuse3."""

    class Worse(Broken):
        """A disk whose fast path raises."""

        def try_read(self, _start: int, _length: int) -> None:
            """Fail."""
            raise self._error

        def try_write(self, _start: int, _data: bytes) -> bool:
            """Fail."""
            raise self._error

    handlers = operations(export(Worse(ValueError("oops"))))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await (handlers.read(2, 0, 4) if name == "read" else handlers.write(2, 0, b"1234"))
    assert caught.value.errno == errno.EIO
    assert f"internal error in {name}" in caplog.text


async def test_fallocate_succeeds_if_another_request_grows_the_disk_meanwhile(
    tmp_path: Path,
) -> None:
    """A disk that grows beyond the range while clusters are allocated is allocated and kept."""
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    answers: list[int] = []
    answered, grown = trio.Event(), 8 << 20

    class Request:
        """A request that keeps its answer."""

        def error(self, number: int) -> None:
            """Keep the errno."""
            answers.append(number)
            answered.set()

    async with open_disk(str(image), OpenOptions(writable=True)) as disk, trio.open_nursery() as n:
        allocate, calls = disk.allocate, list[int]()

        async def allocate_slowly(start: int, length: int) -> None:
            """Let another request grow the disk during the first allocation."""
            if not calls:
                await disk.grow(grown)
            calls.append(start)
            await allocate(start, length)

        disk.allocate = allocate_slowly  # type: ignore[method-assign]
        handlers = operations(export(disk), parse_options(["growable"]))
        unused = cast("Any", None)
        handler = FallocateLseek(handlers, unused, unused, n)
        handler(cast("Any", Request()), "fallocate", 2, 0, 0, 2 << 20)
        with trio.fail_after(60):
            await answered.wait()
        assert (answers, calls, disk.size) == ([0], [0, 0], grown)


@pytest.mark.parametrize("error", [HostError("no thread"), OSError(errno.EPERM, "refused")])
async def test_times_that_cannot_be_set_are_only_logged(error: Exception, tmp_path: Path) -> None:
    """The kernel sets the times before an fsync, which must not fail because of them."""
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    tried: list[int] = []
    async with open_disk(str(image), OpenOptions(writable=True)) as disk:

        async def refuse(atime_ns: int, mtime_ns: int) -> None:
            tried.append(atime_ns + mtime_ns)
            raise error

        disk.set_times = refuse  # type: ignore[method-assign]
        (exported,) = export(disk).by_inode.values()
        await set_times(exported, 1, 2)
    assert tried == [3]


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
async def test_data_that_is_written_back_during_a_search_is_no_hole(
    whence: int, tmp_path: Path
) -> None:
    """Pages that the kernel sends before it releases the last writer are data for a search.

    That the search has passed their range already makes no difference.
    """
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    offsets: list[int] = []
    answered = trio.Event()

    class Request:
        """A request that keeps its answer."""

        def offset(self, offset: int) -> None:
            """Keep the offset."""
            offsets.append(offset)
            answered.set()

    async with open_disk(str(image), OpenOptions(writable=True)) as disk, trio.open_nursery() as n:
        disks = export(disk)
        (exported,) = disks.by_inode.values()
        exported.writers = 1
        next_data, found = disk.next_data, list[int | None]()

        async def next_data_slowly(start: int) -> int | None:
            """Write back after the first search, and release the writer."""
            found.append(await next_data(start))
            if len(found) == 1:
                await disk.write(0, b"x" * 65536)
                exported.writers = 0
            return found[-1]

        disk.next_data = next_data_slowly  # type: ignore[method-assign]
        unused = cast("Any", None)
        handler = FallocateLseek(operations(disks), unused, unused, n)
        handler(cast("Any", Request()), "lseek", 2, whence, 0, 0)
        with trio.fail_after(60):
            await answered.wait()
    assert found[0] is None, "the range was passed before the data was written"
    assert offsets == [0 if whence == os.SEEK_DATA else 65536]


@pytest.mark.expect_log("server")
@pytest.mark.parametrize("kind", [RemoteError, ObjectChangedError, ForeignError])
async def test_what_a_server_makes_a_write_lose_is_logged(
    kind: type[RemoteError | ForeignError], caplog: pytest.LogCaptureFixture
) -> None:
    """A write from the kernel's cache that fails for a server is logged as lost, in one line.

    The line is written also if the outage was logged, and not again for each further write.
    """
    error = kind("server")
    error.is_logged = True
    disks = export(Broken(error), Broken(error))
    handlers = operations(disks)
    for _ in range(5):
        with pytest.raises(FUSEError) as caught:
            await handlers.write(2, 0, b"data")
        assert caught.value.errno == error.errno
    assert disks.with_lost_data == ["vm.qed"]
    (line,) = caplog.messages
    assert line.startswith("vm.qed: data that a program has written is lost, because ")
    assert line.endswith(": server")


@pytest.mark.parametrize(
    ("handle", "options"),
    [
        (2 | HANDLE_WRITER | HANDLE_DIRECT, MountOptions()),
        (2 | HANDLE_WRITER, MountOptions(direct_io=True)),
        (2 | HANDLE_WRITER, MountOptions(truncate="zero")),
    ],
)
async def test_a_write_that_the_program_sees_fail_is_not_lost(
    handle: int, options: MountOptions
) -> None:
    """A write that does not come from the kernel's cache only fails."""
    error = RemoteError("server")
    error.is_logged = True
    disks = export(Broken(error))
    with pytest.raises(FUSEError):
        await operations(disks, options).write(handle, 0, b"data")
    assert not disks.with_lost_data


@pytest.mark.expect_log("server")
@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("kind", [RemoteError, ForeignError, CorruptImageError])
async def test_a_failed_write_makes_its_file_stale_if_another_has_its_bytes(
    kind: type[Exception],
    is_fast: bool,  # noqa: FBT001  a parameter of pytest
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next open of the file makes the kernel drop the page whose write has failed."""
    dropped: list[int] = []

    async def drop(exported: ExportedDisk) -> bool:
        dropped.append(exported.inode)
        return True

    error = kind("server")
    disk = Broken(error)
    disks = export(disk, Broken(error))
    whole, alone = disks
    disks.set_partitions(whole, {b"vm.raw.p1": DiskWindow(cast("Disk", disk), 0, 512, "p1")})
    handlers = operations(disks)
    files = PartitionFiles(disks, drop, lambda: None)
    if is_fast:

        def fail(*_arguments: object) -> NoReturn:
            raise error

        monkeypatch.setattr(handlers.fast, "write", fail)
    for inode in (whole.inode, alone.inode):
        with pytest.raises(FUSEError):
            await handlers.write(inode, 0, b"data")
    assert [item.name for item in disks if item.is_stale] == [b"vm.raw"]
    for exported in disks:
        assert await files.drop_stale_pages(exported)
    assert dropped == [whole.inode]


@pytest.mark.expect_log("full")
async def test_a_write_that_fails_while_pages_are_dropped_keeps_its_file_stale() -> None:
    """Its page may be newer than the drop, so the opens under way and the next one drop pages."""
    disk = Broken(HostError("full", errno.ENOSPC))
    disks = export(disk)
    (whole,) = disks
    disks.set_partitions(whole, {b"vm.raw.p1": DiskWindow(cast("Disk", disk), 0, 512, "p1")})
    handlers = operations(disks)
    has_failed = trio.Event()
    drops = 0

    async def drop(_exported: ExportedDisk) -> bool:
        nonlocal drops
        drops += 1
        await has_failed.wait()
        return True

    files = PartitionFiles(disks, drop, lambda: None)
    disks.write_failed(whole)
    current: list[bool] = []

    async def open_file() -> None:
        current.append(await files.drop_stale_pages(whole))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_file)
        nursery.start_soon(open_file)
        await trio.testing.wait_all_tasks_blocked()
        assert drops == 2
        with pytest.raises(FUSEError):
            await handlers.write(whole.inode, 0, b"data")
        has_failed.set()
    assert current == [False, False]
    assert whole.is_stale
    assert await files.drop_stale_pages(whole)
    assert not whole.is_stale


class Outage:
    """A disk with a partition whose reads fail on demand."""

    size = 1 << 20
    name = "vm.qed"

    def __init__(self) -> None:
        """Fail until ``error`` is None."""
        self.error: Exception | None = RemoteError("no answer")
        self.reads = 0
        self.on_read: Callable[[], object] = lambda: None
        entry = struct.pack("<4xB3xII", 0x83, 8, 16)
        self._content = (bytes(446) + entry).ljust(510, b"\0") + b"\x55\xaa"

    async def read(self, start: int, length: int) -> bytes:
        """Fail, or return some bytes."""
        self.reads += 1
        self.on_read()
        await trio.testing.wait_all_tasks_blocked()
        if self.error is not None:
            raise self.error
        return self._content.ljust(self.size, b"\0")[start : start + length]


@pytest.mark.expect_log("cannot read the partition table")
async def test_a_partition_table_is_read_again_after_an_outage(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of partitions appear when the disk can be read again; attempts are five seconds apart.

    The log has one line for each outage, however many attempts fail.
    """
    disk = Outage()
    whole = ExportedDisk(cast("Disk", disk), b"vm.raw", 2)
    changes: list[None] = []
    disks = ExportedDisks([whole], with_partitions=True)
    files = PartitionFiles(disks, drop_pages, lambda: changes.append(None))

    async def refresh() -> int:
        """Refresh from two tasks, and during each read from another; return the number of reads."""
        before = disk.reads
        async with trio.open_nursery() as nursery:
            disk.on_read = partial(nursery.start_soon, files.refresh)
            nursery.start_soon(files.refresh)
            nursery.start_soon(files.refresh)
        return disk.reads - before

    for _ in range(3):
        assert await refresh() == 1
        mock_clock.jump(4.9)
        assert await refresh() == 0
        mock_clock.jump(0.2)
    assert (list(disks.by_name), len(caplog.messages)) == ([b"vm.raw"], 1)
    disk.error = None
    assert await refresh() > 1
    assert (list(disks.by_name), len(changes)) == ([b"vm.raw", b"vm.raw.p1"], 1)
    mock_clock.jump(1000)
    assert await refresh() == 0
    # The next outage removes the file, and is logged again.
    disk.error = RemoteError("no answer")
    disks.handle_opened(whole, writer=True)
    disks.handle_closed(whole, writer=True)
    assert await refresh() == 1
    assert (list(disks.by_name), len(caplog.messages)) == ([b"vm.raw"], 2)


async def test_a_table_that_is_being_read_delays_only_its_own_disk(
    autojump_clock: MockClock,  # noqa: ARG001  a fixture, for `trio.fail_after`
) -> None:
    """Lookups, opens and changes of size of another disk end before the table has been read."""
    answered = trio.Event()
    silent, answering = Outage(), Outage()
    silent.error = answering.error = None
    disks = ExportedDisks(
        [
            ExportedDisk(cast("Disk", silent), b"a.raw", 2),
            ExportedDisk(cast("Disk", answering), b"b.raw", 3),
        ],
        with_partitions=True,
    )
    handlers = operations(disks)
    handlers._attributes = cast("Any", SimpleNamespace(for_reply=id, of_disk=id))
    read = silent.read

    async def read_late(start: int, length: int) -> bytes:
        await answered.wait()
        return await read(start, length)

    silent.read = read_late  # type: ignore[method-assign]
    ended: list[str] = []

    async def run(name: str, request: Callable[[], Awaitable[object]]) -> None:
        await request()
        ended.append(name)

    user = context()
    async with trio.open_nursery() as nursery:
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "lookup": partial(handlers.lookup, ROOT_INODE, b"a.raw.p1", user),
            "open": partial(handlers.open, 2, os.O_RDONLY, user),
            "opendir": partial(handlers.opendir, ROOT_INODE, user),
        }
        for key, request in requests.items():
            nursery.start_soon(run, key, request)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            for name in (b"b.raw.p1", b"b.raw"):
                await handlers.lookup(ROOT_INODE, name, user)
            with pytest.raises(FUSEError):
                await handlers.lookup(ROOT_INODE, b"absent", user)
            await handlers.open(3, os.O_RDONLY, user)
            size = cast("Any", SimpleNamespace(st_size=1 << 20))
            await handlers.setattr(3, size, to_set("size"), None, user)
        assert not ended, "these requests need the table"
        answered.set()
    assert sorted(ended) == ["lookup", "open", "opendir"]
    assert {b"a.raw.p1", b"b.raw.p1"} <= set(disks.by_name)
