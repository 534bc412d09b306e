"""Tasks that run beside an ``async with`` block."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import TypeAlias

    Progress: TypeAlias = Callable[[int, int], None]
    """A function that is called with the work done so far and the whole work, in the same
    unit."""

_PROGRESS_INTERVAL_SECONDS: Final = 0.1
"""Time between two calls of the function that `periodic_progress` gets."""


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises a single error without an exception group.

    The end of the ``async with`` block waits for the tasks.  If they do not end by themselves, the
    caller must cancel the nursery's ``cancel_scope``.

    trio wraps every error that leaves a nursery in an exception group, because several tasks
    may fail concurrently.  Callers of a function that uses a nursery internally do not expect
    a group.  So this function raises a group only if there are several errors.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        # "from" keeps the error's own cause, and keeps the group out of tracebacks.
        raise group.exceptions[0] from group.exceptions[0].__cause__


@asynccontextmanager
async def periodic_progress(progress: Callable[[], None] | None) -> AsyncIterator[None]:
    """Call ``progress`` every 0.1 seconds during the ``async with`` block, and once after success.

    This is for operations that do not report their progress themselves.  If ``progress`` is None,
    nothing is called.
    """
    if progress is None:
        yield
        return

    async def repeat() -> None:
        while True:
            progress()
            await trio.sleep(_PROGRESS_INTERVAL_SECONDS)

    async with background_tasks() as nursery:
        nursery.start_soon(repeat)
        yield
        nursery.cancel_scope.cancel()
    progress()
