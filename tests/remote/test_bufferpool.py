"""Buffers of parts: used again when no view is left, never before, and bounded in number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.remote.bufferpool import BUFFER_BYTES, BufferPool
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.remote.test_fetcher import fetching
from tests.support.remotes import read
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from pathlib import Path


def test_a_buffer_is_used_again_when_no_view_is_left() -> None:
    """A part of a view keeps the buffer as well."""
    pool = BufferPool()
    first = pool.take(BUFFER_BYTES)
    first[:] = b"a" * BUFFER_BYTES
    part = first[-4:]
    del first
    other = pool.take(4)
    other[:] = b"bbbb"
    assert bytes(part) == b"aaaa"
    del part
    again = pool.take(BUFFER_BYTES)
    assert bytes(again[-4:]) == b"aaaa"  # the first buffer
    assert bytes(other) == b"bbbb"


def test_the_number_of_buffers_is_bounded() -> None:
    """Further and longer buffers are not kept, and none is kept after `clear`."""
    pool = BufferPool()
    views = [pool.take(UNIT_BYTES) for _ in range(20)]
    assert len({id(view.obj) for view in views}) == 20
    assert len(pool.take(BUFFER_BYTES + 1)) == BUFFER_BYTES + 1
    assert len(pool._buffers) == 8
    pool.clear()
    assert not pool._buffers


def test_threads_that_are_idle_keep_no_content(tmp_path: Path) -> None:
    """When all flights have ended, every buffer can be used again."""
    with fetching(tmp_path) as (_, fetcher, file):
        for unit in range(0, 40, 4):
            assert read(file, unit * UNIT_BYTES, 4 * UNIT_BYTES)
        wait_until(lambda: not fetcher._flights)
        buffers = fetcher._loader._buffers
        count = len(buffers._buffers)
        assert count

        def are_free() -> bool:
            views = [buffers.take(BUFFER_BYTES) for _ in range(count)]
            return len(buffers._buffers) == count and len({id(view.obj) for view in views}) == count

        wait_until(are_free)
