"""Tasks that run beside an ``async with`` block."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import QedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import TypeAlias

    Progress: TypeAlias = Callable[[int, int], None]
    """A function that is called with the work done and the whole work, in the same unit."""

_log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_SECONDS: Final = 0.1
"""Time between two calls of the function that `periodic_progress` gets."""


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """Open a nursery that raises a single error without an exception group.

    The end of the ``async with`` block waits for the tasks.  The caller must cancel the nursery's
    ``cancel_scope`` if they do not end by themselves.

    trio wraps every error that leaves a nursery in an exception group, which callers do not expect:
    they handle a `QedError`, and print a group with trio's own message.  So of several errors the
    first `QedError` is raised, or the first OSError if there is none; the others are logged at the
    level debug.  A group is raised only if it has several items and one error in it is a bug, or if
    it has only cancellations.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error: BaseException | None = _first_expected_error(group)
        if error is None and len(group.exceptions) > 1:
            raise
        error = error or group.exceptions[0]
        # "from" keeps the error's own cause, and keeps the group out of tracebacks.
        raise error from error.__cause__


def _first_expected_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """Return the error of a group to raise in its place; None if one of its errors is a bug.

    A `QedError` is preferred to an OSError.  The other errors are logged.  Cancellations of tasks
    are left out.  The caller may have been cancelled too, but trio permits that it ends with an
    error nevertheless.
    """
    found, others = group.split((QedError, OSError))
    if found is None or (others is not None and others.split(trio.Cancelled)[1] is not None):
        return None
    errors = list(_leaves(found))
    first = next((error for error in errors if isinstance(error, QedError)), errors[0])
    for error in errors:
        if error is not first:
            _log.debug("another task has failed too: %s", error)
    return first


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yield the errors in a group and in the groups inside it, in order."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


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
