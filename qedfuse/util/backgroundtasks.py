"""Tasks that run beside an ``async with`` block."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import QedError

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

    trio wraps every error that leaves a nursery in an exception group, which callers do not expect:
    they handle a `QedError`, and print a group with trio's own message.  So of several errors of
    this kind the first is raised.  A group is raised only if there are several errors and one is a
    bug.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error: BaseException | None = _first_qed_error(group)
        if error is None and len(group.exceptions) > 1:
            raise
        error = error or group.exceptions[0]
        # "from" keeps the error's own cause, and keeps the group out of tracebacks.
        raise error from error.__cause__


def _first_qed_error(group: BaseExceptionGroup[BaseException]) -> QedError | None:
    """Return the first `QedError` of a group; None if there is none, or if there is a bug as well.

    Cancelled tasks do not count as a bug, even if the caller is cancelled too.
    """
    found, others = group.split(QedError)
    if found is None or (others is not None and others.split(trio.Cancelled)[1] is not None):
        return None
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, QedError)  # noqa: S101  `split` has chosen it
    return error


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
