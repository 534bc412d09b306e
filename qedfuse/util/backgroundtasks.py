"""Tasks that run beside an ``async with`` block."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import TypeAlias

    Progress: TypeAlias = Callable[[int, int], None]
    """A function that is called with the work done and the whole work, in the same unit."""

_PROGRESS_INTERVAL_SECONDS: Final = 0.1
"""Time between two calls of the function that `periodic_progress` gets."""


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises a single error without an exception group.

    The end of the ``async with`` block waits for the tasks.  The caller must cancel the nursery's
    ``cancel_scope`` if they do not end by themselves.

    trio wraps every error that leaves a nursery in an exception group, which callers do not expect.
    So this function raises a group only if there are several errors.
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
    """Call ``progress``, if any, every 0.1 seconds during the block, and once after success."""
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
