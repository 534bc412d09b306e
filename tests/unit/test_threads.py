"""Functions in threads of trio, on a host that refuses a thread."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.errors import HostError
from qedfuse.hostio.threadcalls import ThreadCalls
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

CALLS: dict[str, Callable[[ThreadCalls, int], Awaitable[object]]] = {
    "read": lambda calls, fd: calls.read(fd, 0, memoryview(bytearray(1))),
    "write": lambda calls, fd: calls.write(fd, 0, (b"x",)),
    "datasync": lambda calls, fd: calls.datasync(fd),
    "truncate": lambda calls, fd: calls.truncate(fd, 1),
    "fallocate": lambda calls, fd: calls.fallocate(fd, 0, (0, 1)),
}


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host refuse threads, and let trio have none that are idle."""

    def fail(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    cache = trio._core._thread_cache
    monkeypatch.setattr(cache, "THREAD_CACHE", cache.ThreadCache())
    monkeypatch.setattr(threading.Thread, "start", fail)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("call", CALLS)
async def test_a_refused_thread_is_an_error_of_the_host(call: str, tmp_path: Path) -> None:
    """Each call on a file fails with EAGAIN, as `HostCalls` says, and the file is not changed."""
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(OSError, match="cannot start a thread: can't start") as caught:
            await CALLS[call](ThreadCalls(), fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EAGAIN
    assert not path.stat().st_size


@pytest.mark.usefixtures("no_threads")
async def test_a_refused_thread_is_reported_with_one_line() -> None:
    """A caller without a file gets an error that the commands print unchanged."""
    with pytest.raises(
        HostError, match=r"^cannot start a thread: can't start new thread \("
    ) as caught:
        await run_in_thread(os.getpid)
    assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize("error", [RuntimeError("of the function"), MemoryError()])
async def test_an_error_of_the_function_stays_what_it_is(error: Exception) -> None:
    """An error that only looks like a refused thread is not turned into another one."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await run_in_thread(fail)
    assert caught.value is error


async def test_a_function_in_a_thread_gives_its_result() -> None:
    """The arguments reach the function, and its result comes back."""
    limiter = trio.CapacityLimiter(1)
    assert await run_in_thread(divmod, 7, 3, abandon_on_cancel=True, limiter=limiter) == (2, 1)
