"""A full or failing host: errors are reported, and the disk stays consistent and usable."""

from __future__ import annotations

import errno

import pytest

from qedfuse.errors import HostError, NoSpaceError
from tests.support.disks import (
    build_image,
    difference,
    guest_bytes,
    header_of,
    inspect_image,
    opened,
    pattern,
)
from tests.support.hostfiles import Action, FailingFile, MemoryFile

CLUSTER = 4096
SPAN = 512 * CLUSTER
SIZE = 2 * SPAN


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("short", [0, 100, 5000])
@pytest.mark.parametrize("based", [False, True])
async def test_failed_data_write(number: int, short: int, *, based: bool) -> None:
    """A failed write into new clusters leaves the disk unchanged and, after a close, no leak."""
    base = pattern(SIZE, 9) if based else b""
    inner = MemoryFile(build_image(SIZE, {0: b"a"}, backing=b"base" if based else b""))
    file = FailingFile(inner)
    before = bytearray(base or bytes(SIZE))
    before[:CLUSTER] = b"a".ljust(CLUSTER, b"\0")
    data = pattern(3 * CLUSTER, 1)
    start = 5 * CLUSTER + 100
    async with opened(file, [base] if based else []) as disk:
        await disk.ensure_scanned()
        await disk.write(2 * CLUSTER, b"x")  # the header is written once, here
        before[2 * CLUSTER : 2 * CLUSTER + 1] = b"x"
        file.fail("write", number=number, short=short)
        with pytest.raises(HostError) as caught:
            await disk.write(start, data)
        assert caught.value.errno == number
        assert isinstance(caught.value, NoSpaceError) == (number != errno.EIO)
        assert disk.writable
        assert difference(await disk.read(0, SIZE), before) is None
        await disk.flush()
        assert difference(guest_bytes(inner.content, base), before) is None
        assert await disk.write(start, data) == len(data)
    before[start : start + len(data)] = data
    assert difference(guest_bytes(inner.content, base), before) is None
    found = inspect_image(inner.content)
    assert found.errors == ()
    assert found.leaks == 0
    assert not header_of(inner.content).need_check


@pytest.mark.parametrize(("action", "calls"), [("truncate", 1), ("read", 3), ("write", 3)])
async def test_failure_at_each_step_of_an_allocating_write(action: Action, calls: int) -> None:
    """A failure at any step of an allocating write leaves each sector old or new, and is reported.

    The same write succeeds afterwards.
    """
    base = pattern(SIZE, 4)
    start = SPAN - 300  # into two tables, one of them new
    data = pattern(900, 8)
    for nth in range(1, calls + 2):
        inner = MemoryFile(build_image(SIZE, {0: b"a"}, backing=b"base"))
        file = FailingFile(inner)
        async with opened(file, [base]) as disk:
            await disk.ensure_scanned()
            # A growth of the file that fails is tried again with a shorter one.
            lasting = action == "truncate"
            file.fail(action, nth, errno.ENOSPC, lasting=lasting, may_miss=True)
            if nth <= calls:
                with pytest.raises(NoSpaceError):
                    await disk.write(start, data)
                got = await disk.read(start, 900)
                for at in (0, 300):
                    assert got[at : at + 300] in (data[at : at + 300], base[start + at :][:300])
                file.heal()
            await disk.write(start, data)
            file.heal()
            assert await disk.read(start, 900) == data
        assert (file.struck[action] > 0) == (nth <= calls)
        expected = bytearray(base)
        expected[:CLUSTER] = b"a".ljust(CLUSTER, b"\0")
        expected[start : start + 900] = data
        assert difference(guest_bytes(inner.content, base), expected) is None
        found = inspect_image(inner.content)
        assert found.errors == ()
        assert found.leaks <= 1


async def test_full_host_goes_on_serving() -> None:
    """On a full host, reads and writes in place succeed."""
    inner = MemoryFile(build_image(SIZE, {0: b"a" * CLUSTER}))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(CLUSTER, b"b")
        file.fail("truncate", None, errno.ENOSPC)
        room = await fill(file, disk.write)
        assert room > 200, "what the file was grown ahead is usable"
        assert await disk.read(0, CLUSTER) == b"a" * CLUSTER
        assert await disk.write(0, b"c") == 1
        await disk.flush()
        file.heal()
        await disk.write(SPAN, b"d")
    assert inspect_image(inner.content).errors == ()
    assert inspect_image(inner.content).leaks == 0
    assert guest_bytes(inner.content)[SPAN : SPAN + 1] == b"d"


async def fill(file: FailingFile, write: object) -> int:
    """Write to one new cluster after the other, and return the number of the first that fails."""
    assert file.inner.size()
    for number in range(2, 512):
        try:
            await write(number * CLUSTER, b"x")  # type: ignore[operator]
        except NoSpaceError:
            return number
    msg = "the host was never full"
    raise AssertionError(msg)


@pytest.mark.parametrize("size", [None, 5 * CLUSTER])
async def test_read_that_fails_or_comes_short(size: int | None) -> None:
    """A failed or short host read raises an error instead of returning zeros."""
    inner = MemoryFile(build_image(SIZE, {0: b"a" * CLUSTER, 1: b"b" * CLUSTER, 3: b"c"}))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        assert await disk.read(0, 1) == b"a"
        if size is None:
            file.fail("read")
        else:
            await inner.truncate(4 * CLUSTER - 10)
        with pytest.raises(HostError, match="image: "):
            await disk.read(0, CLUSTER)
        if size is None:
            file.fail("read")
        with pytest.raises(HostError):
            await disk.read(0, 4 * CLUSTER)
