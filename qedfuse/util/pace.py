"""Turns for other tasks in the course of a long piece of work that hardly ever waits."""

from __future__ import annotations

import time
from typing import Final

import trio

MAX_STEPS: Final = 32
"""Steps between two turns of others.  A step is one small write to the host's cache, or as
much work: 20 to 100 microseconds."""

_MAX_SECONDS: Final = 0.003
"""The same in time: on a busy host one such write can take milliseconds."""


class Pace:
    """Counts the steps of one piece of work."""

    def __init__(self) -> None:
        """Begin."""
        self._steps = 0
        self._since = time.perf_counter()

    async def step(self) -> None:
        """Note that a step has been done; lets other tasks run when it is time."""
        self._steps += 1
        if self._steps >= MAX_STEPS or time.perf_counter() - self._since > _MAX_SECONDS:
            await trio.lowlevel.checkpoint()
            self._steps = 0
            self._since = time.perf_counter()
