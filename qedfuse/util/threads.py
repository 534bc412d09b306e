"""Starting a thread, or calling a function in a thread of trio, on a host that may refuse it."""

from __future__ import annotations

import errno
import threading
from functools import partial
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio import CapacityLimiter

Args = TypeVarTuple("Args")
T = TypeVar("T")


class HelperThread(threading.Thread):
    """A daemon thread in which only functions of this package run, not the program's own code."""

    def __init__(self, run: Callable[[], object], name: str | None) -> None:
        """Prepare to call ``run`` in a thread with this name."""
        super().__init__(target=run, name=name, daemon=True)


def start_thread(
    function: Callable[[*Args], object], *args: *Args, name: str | None = None
) -> threading.Thread:
    """Call a function in a new daemon thread; return the thread, which has been started.

    Raises:
        OSError: The host cannot start a thread (EAGAIN).
    """
    thread = HelperThread(partial(function, *args), name)
    start(thread)
    return thread


def start(thread: threading.Thread) -> None:
    """Start ``thread``, which must not have been started before.

    Raises:
        OSError: As in `start_thread`.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise OSError(errno.EAGAIN, f"cannot start a thread: {error}") from error


async def run_in_thread(
    function: Callable[[*Args], T],
    *args: *Args,
    abandon_on_cancel: bool = False,
    limiter: CapacityLimiter | None = None,
) -> T:
    """Call a function in a worker thread of trio; return its result, or raise its exception.

    ``abandon_on_cancel`` and ``limiter`` are those of `trio.to_thread.run_sync`.

    Raises:
        HostError: The host cannot start a thread (EAGAIN).  The function was not called.
    """
    import trio  # noqa: PLC0415  imported late: `start_thread` needs no event loop

    has_begun = False

    def call() -> T:
        nonlocal has_begun
        has_begun = True
        return function(*args)

    try:
        return await trio.to_thread.run_sync(
            call, abandon_on_cancel=abandon_on_cancel, limiter=limiter
        )
    except (RuntimeError, MemoryError) as error:
        if has_begun:  # an error of the function itself
            raise
        msg = f"cannot start a thread: {error} (a limit of processes or of memory is reached)"
        raise HostError(msg, errno.EAGAIN) from error


async def open_in_thread(opening: Callable[[], T], close: Callable[[T], object]) -> T:
    """Call ``opening`` in a worker thread of trio; return the opened file, or raise its exception.

    A cancellation does not wait for the thread.  What the thread has opened, or opens later, is
    then passed to ``close``, because no task waits for it any more.

    Raises:
        HostError: As in `run_in_thread`.
    """
    lock = threading.Lock()
    opened: list[T] = []
    is_abandoned = False

    def keep_result() -> T:
        result = opening()
        with lock:
            opened.append(result)
            must_close = is_abandoned
        if must_close:
            close(result)
        return result

    try:
        return await run_in_thread(keep_result, abandon_on_cancel=True)
    except BaseException:
        with lock:
            is_abandoned = True
            left = tuple(opened)
        for result in left:
            close(result)
        raise
