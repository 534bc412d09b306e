"""A header change that was reported as failed is not in the file, now or later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError
from tests.support.disks import build_image, guest_bytes, header_of, opened, pattern
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Write

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.disk.disk import Disk

CLUSTER = 4096
SIZE = 64 * CLUSTER

CHANGES: dict[str, Callable[[Disk], Awaitable[object]]] = {
    "size": lambda disk: disk.grow(SIZE + CLUSTER),
    "smaller size": lambda disk: disk.shrink(SIZE - CLUSTER, force=True),
    "short name": lambda disk: disk.set_backing(b"another", backing_is_raw=True),
    "long name": lambda disk: disk.set_backing(b"n" * 700, backing_is_raw=False),
    "no name": lambda disk: disk.set_backing(b"", backing_is_raw=False),
    "NEED_CHECK": lambda disk: disk.write(9 * CLUSTER, b"x"),
}


def in_header(content: bytes | bytearray) -> tuple[int, int, bytes]:
    """Return what the changes change: the size, the features, the name of the base."""
    header = header_of(content)
    start = header.backing_filename_offset if header.has_backing else 0
    end = start + header.backing_filename_size if header.has_backing else 0
    return header.image_size, header.features, bytes(content[start:end])


@pytest.mark.parametrize("written", [0, 40, 1 << 20], ids=["nothing", "a part", "all of it"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_failed_change_is_undone(change: str, written: int) -> None:
    """If any write of a header change fails, the header keeps its old value.

    The disk and its header agree afterwards, and the next header write brings the file back to
    them.
    """
    content = build_image(SIZE, {0: pattern(CLUSTER, 1)}, backing=b"the base")
    failures = nth = 0
    inner = MemoryFile(content)
    while failures == nth:
        nth += 1
        inner = MemoryFile(content)
        file = FailingFile(inner)
        async with opened(file, [b"base"]) as disk:
            before = in_header(inner.content)
            await disk.write(0, pattern(CLUSTER, 2))
            if change != "NEED_CHECK":
                # Dirty tables, so that a write after that of the header can fail as well.
                await disk.write(5 * CLUSTER, pattern(CLUSTER, 5))
            file.fail("write", nth, short=written, may_miss=True)
            try:
                await CHANGES[change](disk)
            except HostError:
                failures += 1
            file.heal()
            failed = failures == nth
            assert bool(file.struck["write"]) == failed, "a failed write is reported"
            assert disk.size == disk.header.image_size
            if failed and change != "smaller size":
                assert disk.size == SIZE
            # What comes after the new size, when the disk shrinks, may fail as well.
            failed = failed and disk.size == SIZE
            await disk.write(7 * CLUSTER, pattern(CLUSTER, 7))
            await disk.flush()
            if failed:
                assert in_header(inner.content)[::2] == before[::2]
        assert not header_of(inner.content).need_check
        if failed or change == "NEED_CHECK":
            assert in_header(inner.content) == before
        else:
            assert in_header(inner.content) != before
    assert failures, "no write failed"
    assert guest_bytes(inner.content)[7 * CLUSTER : 8 * CLUSTER] == pattern(CLUSTER, 7)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "NEED_CHECK"])
@pytest.mark.expect_log("the disk is read-only from now on")
async def test_a_change_that_is_not_durable_is_undone_in_the_file(change: str) -> None:
    """If any datasync of a header change fails, the file gets the old header back."""
    content = build_image(SIZE, {0: pattern(CLUSTER, 1)}, backing=b"the base")
    taken_back = nth = began = 0
    inner, before, failed = RecordingFile(content), in_header(content), True
    while failed:
        nth += 1
        inner = RecordingFile(content)
        file = FailingFile(inner)
        disk = None
        try:
            async with opened(file, [b"base"]) as disk:
                await disk.write(5 * CLUSTER, pattern(CLUSTER, 5))
                await disk.flush()
                before, began = in_header(inner.content), len(inner.changes)
                file.fail("datasync", nth, lasting=True, may_miss=True)
                await CHANGES[change](disk)
                file.heal()
            failed = False
        except HostError:
            assert disk is not None
            assert header_of(inner.content) == disk.header
            assert disk.header.need_check
            if disk.size == SIZE:
                assert in_header(inner.content) == before
                taken_back += sum(
                    isinstance(item, Write) and item.offset == 0 for item in inner.changes[began:]
                )
    assert in_header(inner.content) != before
    # The change and what took it back.
    assert taken_back == 2


@pytest.mark.parametrize("change", ["size", "short name"])
async def test_the_header_in_memory_changes_when_it_is_durable(change: str) -> None:
    """The header in memory changes only when the change is durable, together with the size."""
    content = build_image(SIZE, {0: pattern(CLUSTER, 1)}, backing=b"the base")
    file = MemoryFile(content)
    seen = []
    async with opened(file, [b"base"]) as disk:
        before = disk.header
        datasync = file.datasync

        async def watched() -> None:
            seen.append((disk.header == before, disk.size == disk.header.image_size))
            await datasync()

        file.datasync = watched  # type: ignore[method-assign]
        await CHANGES[change](disk)
        assert disk.header != before
    assert (True, True) in seen
    assert all(same for _, same in seen)
