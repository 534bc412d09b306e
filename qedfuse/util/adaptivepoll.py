"""Adaptive polling: the decision whether to poll for an event or to sleep until the event."""

from __future__ import annotations

from typing import Final

_MAX_CONFIDENCE: Final = 16
"""Maximum of the confidence counter (`AdaptivePoll`).  Even at the maximum, this number of long
waits in a row ends polling."""
_RESET_FACTOR: Final = 8
"""A wait longer than this multiple of the maximum time to poll resets the counter to 0."""
_WAKE_FACTOR: Final = 2
"""A wait in which the task slept counts as short up to this multiple of the maximum time to poll,
because a task that sleeps notices the event late."""


class AdaptivePoll:
    """Decides how long to poll for the next event, from the durations of earlier waits.

    A confidence counter rises with each wait that is so short that polling would have found the
    event, and falls with each longer wait.  Polling is enabled while the counter is positive.
    """

    def __init__(self, seconds: float, *, start_enabled: bool = False) -> None:
        """Start with polling enabled only if ``start_enabled`` is True.

        Args:
            seconds: Maximum time to poll for one event; 0 to never poll.
            start_enabled: Whether to poll before the first short wait.
        """
        self._max_seconds = seconds
        self._confidence = _MAX_CONFIDENCE if start_enabled else 0

    @property
    def seconds(self) -> float:
        """The maximum time to poll for the next event; 0 while polling is disabled."""
        return self._max_seconds if self._confidence > 0 else 0.0

    def record(self, seconds: float, *, slept: bool) -> None:
        """Record how long one wait took.

        Args:
            seconds: How long the wait took; 0 if polling has found the event.
            slept: Whether the task slept, or let other tasks run, instead of polling.
        """
        if seconds <= self._max_seconds * (_WAKE_FACTOR if slept else 1):
            self._confidence = min(_MAX_CONFIDENCE, self._confidence + 2)
        elif seconds > self._max_seconds * _RESET_FACTOR:
            self._confidence = 0
        elif self._confidence > 0:
            self._confidence -= 1
