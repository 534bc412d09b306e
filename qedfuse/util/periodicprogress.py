"""Saying again and again how far something is that does not say so itself."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_INTERVAL: Final = 0.1
"""Seconds between two reports."""


@asynccontextmanager
async def periodic_progress(report: Callable[[], None] | None) -> AsyncIterator[None]:
    """Call a function again and again while the block runs, and at its end if all went well."""
    if report is None:
        yield
        return

    async def repeat() -> None:
        while True:
            report()
            await trio.sleep(_INTERVAL)

    async with open_scope() as nursery:
        nursery.start_soon(repeat)
        yield
        nursery.cancel_scope.cancel()
    report()
