"""Feature bits: which are kept, which are cleared and when, and which refuse the image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.errors import HostError, ReadOnlyError, UnsupportedError
from tests.support.disks import WRITABLE, build_image, header_of, opened
from tests.support.hostfiles import FailingFile, RecordingFile, Sync, Write

CLUSTER = 4096
SIZE = 64 * CLUSTER


async def test_autoclear_is_cleared_durably_before_the_first_change() -> None:
    """The header without autoclear bits is durable before any other byte is written."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}, autoclear=0x8001, compat=0x4002))
    async with opened(file) as disk:
        assert disk.header.autoclear_features == 0x8001
        assert file.changes == []
        await disk.write(0, b"b")
        first, second, third = file.changes[:3]
    assert isinstance(first, Write)
    assert first.offset == 0
    assert isinstance(second, Sync)
    assert isinstance(third, Write)
    assert third.data == b"b"
    header = header_of(file.content)
    assert (header.autoclear_features, header.compat_features) == (0, 0x4002)
    assert not header.need_check


async def test_every_writer_waits_for_the_autoclear_bits() -> None:
    """A second writer waits while the first one clears the autoclear bits."""
    recording = RecordingFile(build_image(SIZE, {0: b"a", 1: b"b"}, autoclear=1))
    file = FailingFile(recording)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        with file.hold("datasync") as held:
            nursery.start_soon(disk.write, 0, b"x")
            await held.reached.wait()
            nursery.start_soon(disk.write, CLUSTER, b"y")
            nursery.start_soon(disk.grow, 2 * SIZE)
            await wait_all_tasks_blocked()
            assert len(recording.changes) == 1, "only the header has been written"
    assert isinstance(recording.changes[1], Sync)


@pytest.mark.parametrize(
    "action",
    ["write", pytest.param("datasync", marks=pytest.mark.expect_log("read-only from now on"))],
)
async def test_bits_that_cannot_be_cleared_stop_all_changes(action: str) -> None:
    """While autoclear bits are in the file, every write fails."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}, autoclear=1))
    file = FailingFile(recording)
    async with opened(file) as disk:
        file.fail(action)  # type: ignore[arg-type]
        with pytest.raises(HostError):
            await disk.write(0, b"x")
        if action == "write":
            # All that was written is the old header, over what may be a part of the new one.
            (written,) = recording.changes
            assert isinstance(written, Write)
            assert header_of(written.data).autoclear_features == 1
            recording.changes.clear()
            await disk.write(0, b"y")
            assert isinstance(recording.changes[1], Sync)
        else:
            with pytest.raises(ReadOnlyError):
                await disk.write(0, b"y")
            disk._lifecycle._closed = True
    assert recording.content.count(b"x") == 0


async def test_autoclear_goes_before_need_check_is_cleared() -> None:
    """Autoclear bits are cleared before NEED_CHECK is, also without any other write."""
    image = build_image(SIZE, {0: b"a"}, autoclear=1, features=2)
    file = RecordingFile(image)
    async with opened(file):
        pass
    header = header_of(file.content)
    assert not header.need_check
    assert header.autoclear_features == 0
    first, second = file.changes[:2]
    assert isinstance(first, Write)
    assert isinstance(second, Sync)
    assert header_of(first.data).need_check
    assert header_of(first.data).autoclear_features == 0


@pytest.mark.parametrize("writable", [True, False])
async def test_nothing_is_written_without_a_change(*, writable: bool) -> None:
    """Opening, reading, flushing and closing a clean image writes nothing."""
    image = build_image(SIZE, {0: b"a"}, autoclear=1, compat=1, header_size=2)
    file = RecordingFile(image, writable=writable)
    async with opened(file) as disk:
        await disk.read(0, SIZE)
        await disk.flush()
    assert file.changes == []


async def test_compat_bits_and_header_extras_are_kept() -> None:
    """Unknown compat bits and bytes after the header fields survive each header change."""
    image = build_image(SIZE, {0: b"a"}, compat=(1 << 63) | 2, header_size=2, backing=b"name")
    image[200:300] = b"e" * 100
    image[CLUSTER : CLUSTER + 100] = b"f" * 100
    file = RecordingFile(image)
    async with opened(file, [b"base"]) as disk:
        await disk.write(CLUSTER, b"x")
        await disk.grow(2 * SIZE)
    assert file.content[64 : CLUSTER * 2] == image[64 : CLUSTER * 2]
    header = header_of(file.content)
    assert replace(header, image_size=SIZE) == header_of(image)


@pytest.mark.parametrize("bit", [3, 31, 32, 63])
async def test_unknown_incompatible_bit_is_refused_by_number(bit: int) -> None:
    """An unknown incompatible bit is refused by its number, for reading and writing."""
    image = build_image(SIZE, features=1 << bit)
    for writable in (True, False):
        file = RecordingFile(image, writable=writable)
        with pytest.raises(UnsupportedError, match=rf"image: .*\(bit {bit}\)"):
            async with opened(file, options=WRITABLE):
                pass
        assert file.changes == []
