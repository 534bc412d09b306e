"""Checkpoints at regular intervals in long work that seldom waits, so that other tasks run."""

from __future__ import annotations

import time
from typing import Final

import trio

MAX_STEPS: Final = 32
"""Maximum number of steps between two checkpoints.  A step takes about as long as a small write to
the page cache: 20 to 100 microseconds."""

_MAX_SECONDS: Final = 0.003
"""Maximum time between two checkpoints.  On a busy host a single step can take milliseconds."""


class Pace:
    """Counts the steps of one task's work."""

    def __init__(self) -> None:
        """Start with no steps done."""
        self._steps = 0
        self._since = time.perf_counter()

    async def step(self) -> None:
        """Count one step; make a checkpoint if `MAX_STEPS` steps or `_MAX_SECONDS` have passed."""
        self._steps += 1
        if self._steps >= MAX_STEPS or time.perf_counter() - self._since > _MAX_SECONDS:
            await trio.lowlevel.checkpoint()
            self._steps = 0
            self._since = time.perf_counter()
