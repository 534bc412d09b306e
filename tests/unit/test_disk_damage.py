"""A disk remembers damage and failures until they are repaired."""

from __future__ import annotations

import pytest

from qedfuse.errors import HostError
from tests.support.disks import (
    build_image,
    header_of,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import MemoryFile

CLUSTER = 4096


@pytest.mark.parametrize(
    "wild",
    [
        pytest.param(True, marks=pytest.mark.expect_log("invalid table entries")),
        False,
    ],
)
async def test_an_image_with_a_wild_entry_is_not_marked_clean(*, wild: bool) -> None:
    """An image in which a bad entry was found keeps NEED_CHECK at its close."""
    image = build_image(1 << 20, {0: pattern(CLUSTER, 1), 5: pattern(CLUSTER, 2)})
    if wild:
        put_entry(image, l2_entry_offset(image, 5), len(image))
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.write(9 * CLUSTER, b"new")
    assert header_of(file.content).need_check == wild


class _BrokenFile(MemoryFile):
    """A file whose first datasync ends in an error that is not the host's."""

    broken = True

    async def datasync(self) -> None:
        """Break off, once."""
        if self.broken:
            self.broken = False
            msg = "can't start new thread"
            raise RuntimeError(msg)
        await super().datasync()


async def test_a_flush_that_broke_off_is_not_taken_for_done() -> None:
    """After a flush with an unexpected exception no later flush succeeds."""
    file = _BrokenFile(build_image(1 << 20))
    with pytest.raises(HostError, match="ended by RuntimeError"):  # noqa: PT012  closing raises
        async with opened(file) as disk:
            await disk.write(0, b"data")
            with pytest.raises(RuntimeError):
                await disk.flush()
            with pytest.raises(HostError, match="ended by RuntimeError"):
                await disk.flush()
            assert not disk.writable
    assert header_of(file.content).need_check
