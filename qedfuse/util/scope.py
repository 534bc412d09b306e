"""A nursery that lets an error through as it is."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def open_scope() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for background tasks that are a detail of what the body does.

    trio wraps whatever leaves a nursery in an exception group, because several tasks
    may fail at once.  A caller who does not know that there are tasks wants the one
    error that there almost always is; only true groups come out as groups.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
