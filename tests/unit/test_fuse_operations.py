"""The parts between the kernel and the disk that need no kernel to be tested."""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, NoReturn, cast

import pyfuse3
import pytest
import trio

from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError, FuseError, MountpointError, PrivilegeError
from qedfuse.mount.fuse import fuseinit
from qedfuse.mount.fuse.attach import _explain, kernel_options
from qedfuse.mount.fuse.exporteddisk import ExportedDisk
from qedfuse.mount.fuse.fuseinit import mask_request, patch_reply
from qedfuse.mount.fuse.operations import Operations
from qedfuse.mount.fuse.truncation import Truncation
from qedfuse.mount.optionparser import parse_options
from qedfuse.mount.options import MountOptions
from tests.support import qemu

if TYPE_CHECKING:
    from pathlib import Path

    from pyfuse3 import RequestContext
    from trio.testing import MockClock

    from qedfuse.disk.disk import Disk

INIT = struct.pack("=IIQQIIII" + "IIII", 56, 26, 1, 0, 0, 0, 0, 0, 7, 40, 1 << 17, 0xFF)


class Broken:
    """A disk that fails at everything with one exception."""

    size = 4096
    writable = True
    failure: str | None = None

    def __init__(self, error: Exception) -> None:
        """Fail with ``error``."""
        self._error = error

    def try_read(self, _start: int, _length: int) -> None:
        """Leave it to `read`."""

    async def read(self, _start: int, _length: int) -> bytes:
        """Fail."""
        raise self._error

    async def flush(self) -> None:
        """Do nothing."""


async def forget_pages(_view: ExportedDisk) -> bool:
    """Have nothing cached."""
    return True


def operations(disk: object, options: MountOptions | None = None) -> Operations:
    """Make the handlers for one disk, as inode 2 of a directory."""
    view = ExportedDisk(cast("Disk", disk), b"vm.raw", 2)
    return Operations([view], options or MountOptions(), forget_pages, directory=True)


class Context:
    """A caller."""

    def __init__(self, uid: int) -> None:
        """Be user ``uid``."""
        self.uid = uid


def context(uid: int = 0) -> RequestContext:
    """Give a caller as pyfuse3 does."""
    return cast("RequestContext", Context(uid))


def test_a_feature_is_declined_and_the_rest_is_passed_on() -> None:
    """One bit of the kernel's offer goes, everything else stays as it is."""
    changed = mask_request(INIT + b"more", 8)
    assert changed == INIT[:52] + struct.pack("=I", 0xF7) + b"more"


@pytest.mark.parametrize("message", [b"", INIT[:50], b"\0" * 100])
def test_another_message_is_refused(message: bytes) -> None:
    """What is not the first message is not touched."""
    with pytest.raises(FuseError, match="expected FUSE_INIT"):
        mask_request(message, 8)


ANSWER = struct.pack("=IiQ" + "IIIIHHII", 80, 0, 2, 7, 31, 1 << 17, 0xF7, 0, 0, 1 << 20, 1)
ANSWER += bytes(80 - len(ANSWER))


@pytest.mark.parametrize(
    ("readahead", "found"),
    [(None, 1 << 17), (1 << 20, 1 << 17), (1 << 16, 1 << 16), (0, 0)],
)
def test_libfuses_answer_is_completed(readahead: int | None, found: int) -> None:
    """More requests in the background, coarse times, less read-ahead if wanted; the rest stays."""
    changed = patch_reply(ANSWER, readahead)
    assert struct.unpack_from("=IIIIHHII", changed, 16) == (
        *(7, 31, found, 0xF7, 64, 48),
        *(1 << 20, 100_000_000),
    )
    assert (changed[:16], changed[44:]) == (ANSWER[:16], ANSWER[44:])


def test_an_answer_that_refuses_is_passed_on() -> None:
    """An error, and the answer to a kernel too old or too new, have no such fields."""
    for answer in (struct.pack("=IiQ", 16, -errno.EPROTO, 2), ANSWER[:24]):
        assert patch_reply(answer, 0) == answer


def test_descriptors_that_threads_close_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be closed between the listing of the descriptors and the look at each."""
    monkeypatch.setattr(fuseinit, "open_descriptors", lambda: {-1})
    assert fuseinit.fuse_descriptors() == set()


def test_what_libfuse_is_told() -> None:
    """Powers are taken away whatever the user says; names are made safe."""
    options = parse_options(["ro,allow_root,noatime,dev,suid"])
    assert kernel_options(options, "/a,b\\ü\n.qed") == {
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
def test_what_libfuse_says_becomes_an_error(said: str, kind: type[Exception]) -> None:
    """The class decides about the exit code; the words stay."""
    error = _explain("/mnt", said)
    assert type(error) is kind
    assert str(error) == f"/mnt: cannot mount: {said}"


def test_words_in_a_name_are_not_what_libfuse_says() -> None:
    """A mountpoint may be called like a reason."""
    name = "/Permission denied/mountpoint"
    assert type(_explain(name, f"fuse: {name}: Invalid argument")) is FuseError


async def test_an_expected_failure_is_answered_and_logged_once(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """The guest gets the errno of the error, the log its one line."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed: bad table"))
    handlers = operations(Broken(CorruptImageError("vm.qed: bad table")))
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
    handlers = operations(Broken(ZeroDivisionError()))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await handlers.read(2, 0, 512)
    assert caught.value.errno == errno.EIO
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].exc_info is not None


class NamedBroken(Broken):
    """A broken disk whose error can be changed."""

    name = "/vm.qed"

    def fail(self, message: str) -> None:
        """Fail with ``message`` from now on."""
        self._error = CorruptImageError(message)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT, os.O_DSYNC, os.O_SYNC | os.O_DIRECT])
async def test_errors_are_counted_for_the_disk_whatever_the_handle(
    flags: int, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """With any flags of open(2); the summary names the disk and not the mount."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed"))
    disk = NamedBroken(CorruptImageError("vm.qed: bad table"))
    for options in (MountOptions(), MountOptions(direct_io=True)):
        handlers = operations(disk, options)
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
    """A disk of which nothing may be discarded."""

    size = 8192

    async def discard(self, start: int, length: int) -> NoReturn:
        """Fail the test."""
        pytest.fail(f"{length} bytes from {start} on are discarded")


async def test_a_correction_of_the_size_never_empties_anything() -> None:
    """The disk may have grown since the kernel was told its size by a truncation."""
    view = ExportedDisk(cast("Disk", Shrunk()), b"vm.raw", 2, correcting=4096)
    truncation = Truncation(MountOptions(growable=True, truncate="zero"), forget_pages)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await truncation.set_size(view, 4096)
    assert caught.value.errno == errno.EPERM


async def test_errors_are_rate_limited_for_each_disk(
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
    request: pytest.FixtureRequest,
) -> None:
    """A hundred lines a disk, then a line a minute that has the number and the last error."""
    request.node.add_marker(pytest.mark.expect_log("vm.qed"))
    disks = [NamedBroken(ValueError()), NamedBroken(ValueError())]
    views = [ExportedDisk(cast("Disk", disk), b"vm.raw", 2 + at) for at, disk in enumerate(disks)]
    handlers = Operations(views, MountOptions(), forget_pages, directory=True)

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
        nursery.start_soon(handlers.errors.run)
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
        # What the minute's line has not told yet is told when the mount ends.
        await fail(0, 500, 502)
        nursery.cancel_scope.cancel()
    assert logged() == [more.format("2 more errors", 501)]
    assert autojump_clock.autojump_threshold == 0


async def test_bugs_are_rate_limited_too(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    """A bug that each request meets has one traceback, whatever way the request takes."""
    request.node.add_marker(pytest.mark.expect_log("internal error in read"))
    handlers = operations(Broken(ZeroDivisionError()))
    for _ in range(3):
        with pytest.raises(pyfuse3.FUSEError):
            await handlers.read(2, 0, 512)
    assert len(caplog.records) == 1


async def test_a_failed_disk_is_reported_by_flush() -> None:
    """Whoever closes a file learns that its writes may be lost."""
    disk = Broken(ValueError())
    handlers = operations(disk)
    await handlers.flush(2)
    disk.failure = "the host's disk broke"
    for call in (handlers.flush(2), handlers.fsync(2, True)):  # noqa: FBT003
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call
        assert caught.value.errno == errno.EIO


async def test_allow_root_turns_others_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root and the owner are served, everybody else gets EACCES."""
    monkeypatch.setattr("os.getuid", lambda: 1000)
    image = qemu.create(tmp_path / "vm.qed", 4096)
    async with open_disk(str(image), OpenOptions()) as disk:
        handlers = operations(disk, parse_options(["allow_root"]))
        for uid in (0, 1000):
            assert (await handlers.lookup(1, b"vm.raw", context(uid))).st_ino == 2
        for call in (handlers.lookup(1, b"vm.raw", context(7)), handlers.opendir(1, context(7)),
                     handlers.getattr(2, context(7)), handlers.open(2, 0, context(7))):  # fmt: skip
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call
            assert caught.value.errno == errno.EACCES


async def test_handles_are_counted(tmp_path: Path) -> None:
    """The last close is noticed, which a signal waits for."""
    image = qemu.create(tmp_path / "vm.qed", 4096)
    closed = []
    async with open_disk(str(image), OpenOptions()) as disk:
        handlers = operations(disk, parse_options(["ro"]))
        handlers.released = lambda: closed.append(handlers.opened)
        first = await handlers.open(2, 0, context())
        second = await handlers.open(2, 0o40000, context())
        assert handlers.opened == 2
        await handlers.release(second.fh)
        assert closed == []
        await handlers.release(first.fh)
        assert closed == [0]


@pytest.mark.expect_log("internal error in")
@pytest.mark.parametrize("name", ["read", "write"])
async def test_a_bug_on_the_short_way_is_answered_too(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends one request, not the mount."""

    class Worse(Broken):
        """A disk that fails where nothing is expected to."""

        def try_read(self, _start: int, _length: int) -> None:
            """Fail."""
            raise self._error

        try_write = try_read

    handlers = operations(Worse(ValueError("oops")))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await (handlers.read(2, 0, 4) if name == "read" else handlers.write(2, 0, b"1234"))
    assert caught.value.errno == errno.EIO
    assert f"internal error in {name}" in caplog.text
