"""Several event loops in one process, as `qedfuse.open` makes one for each file, share no state."""

from __future__ import annotations

import enum
import importlib
import pkgutil
import threading
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import TYPE_CHECKING, Final

import pytest
import trio

import qedfuse
from qedfuse.hostio.nowaitretry import NowaitRetry
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT: Final = 60

SAFE_TO_SHARE: Final = {
    "qedfuse.api._files": "changes in single steps; only a forked child, with one thread, iterates",
    "qedfuse.mount.sandbox.sandbox.urlsplit": "a cache of the standard library, with a lock",
    "qedfuse.nbd.export.RESOLVER": "has a lock",
    "qedfuse.nbd.export.urlsplit": "a cache of the standard library, with a lock",
    "qedfuse.remote.address.urlsplit": "a cache of the standard library, with a lock",
    "qedfuse.remote.connecting.RESOLVER": "has a lock",
    "qedfuse.remote.keyservices._firmware_text": "a cache of the standard library, with a lock",
    "qedfuse.remote.resolver.RESOLVER": "has a lock",
    "qedfuse.remote.storesettings._GUARD": "one flag, set once; a forked child has one thread",
    "qedfuse.util.portal.watcher": "changes in single steps, and a lock for its thread",
    "qedfuse.util.portalthreads._collector": "each thread has its own value",
    "qedfuse.util.portalthreads.watcher": "changes in single steps, and a lock for its thread",
    "qedfuse.check.fastcheck._load": "a cache of the standard library, of one value",
    "qedfuse.tools.inspection.fastmap._load": "a cache of the standard library, of one value",
    "qedfuse.cli.qedimg.log._recorder": "a command runs one event loop; logging has a lock",
    "qedfuse.cli.qedimg.running._active": "signals are handled in the main thread only",
}
"""Variables with state that changes, and why several event loops do not conflict."""


async def in_thread() -> None:
    """Read in a worker thread."""
    pytest.fail("the read was given up")


def read_in_another_loop(loads: list[int]) -> None:
    """Run an event loop that retries a read twice; append the load that each try has seen."""

    def attempt() -> bool:
        loads.append(loop_load().polled_reads)
        return len(loads) == 2

    trio.run(NowaitRetry(lambda: 0.0).wait, attempt, in_thread)


async def test_a_read_is_retried_without_the_reads_of_other_event_loops() -> None:
    """A read that is being retried in one event loop delays no read of another event loop."""
    tries = 0
    loads: list[int] = []

    def attempt() -> bool:
        """Let a whole event loop run in another thread while this read is being retried."""
        nonlocal tries
        tries += 1
        if tries == 1:
            other = threading.Thread(target=read_in_another_loop, args=(loads,), daemon=True)
            other.start()
            other.join(TIMEOUT)
            assert not other.is_alive(), "the read waits for this event loop"
        return tries == 3

    await NowaitRetry(lambda: 0.0).wait(attempt, in_thread)
    assert tries == 3
    assert loads == [1, 1], "each event loop counts its own reads"
    assert loop_load().polled_reads == 0


async def test_the_load_of_an_event_loop_is_its_own() -> None:
    """Requests, polled reads and threads count only in the event loop in which they are."""

    async def load() -> tuple[int, bool, bool]:
        found = loop_load()
        return found.polled_reads, found.has_requests(), found.has_running_threads()

    here = loop_load()
    here.polled_reads += 1
    with here.request_source(lambda: True):
        async with trio.to_thread.current_default_thread_limiter():
            assert await load() == (1, True, True)
            elsewhere = await trio.to_thread.run_sync(trio.run, load)
    assert elsewhere == (0, False, False)
    assert loop_load() is here


def variables() -> Iterator[tuple[str, object]]:
    """Yield the variables of all modules of qedfuse, and of their classes, with dotted names."""
    for info in pkgutil.walk_packages(qedfuse.__path__, "qedfuse."):
        if info.name.endswith(".__main__"):
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            yield f"{info.name}.{name}", value
            is_own_class = isinstance(value, type) and value.__module__ == info.name
            if is_own_class and not issubclass(value, enum.Enum | tuple):
                for attribute, of_class in vars(value).items():
                    yield f"{info.name}.{name}.{attribute}", of_class


def can_change(name: str, value: object) -> bool:
    """Return whether a variable seems to hold state that changes while the program runs.

    A container that has elements after the import counts as a constant table.
    """
    if name.rpartition(".")[2].startswith("__"):
        return False
    if isinstance(value, MutableSequence | MutableMapping | MutableSet):
        return not value
    if isinstance(value, type | tuple | enum.Enum | trio.lowlevel.RunVar) or callable(value):
        return hasattr(value, "cache_info")
    return type(value).__module__.startswith(("qedfuse.", "trio.", "itertools", "_thread"))


def test_event_loops_share_no_variable() -> None:
    """No module or class has state that changes, except state that is safe to share."""
    # A variable of the list counts in any state: earlier tests of this process may have filled it.
    found = [
        name for name, value in variables() if name in SAFE_TO_SHARE or can_change(name, value)
    ]
    assert sorted(found) == sorted(SAFE_TO_SHARE)
