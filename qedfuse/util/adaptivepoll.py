"""Whether it pays to wait for something by looking again and again, instead of going to sleep."""

from __future__ import annotations

from typing import Final

_MAX_CONFIDENCE: Final = 16
_FAR: Final = 8
"""What takes so many times as long as one would look is another case than the last ones."""
_WAKE_FACTOR: Final = 2
"""What came while one slept is seen later than it came: how much later, as a multiple of the
time for which one would have looked."""


class AdaptivePoll:
    """Decides for how long to poll, by how long it took the last times."""

    def __init__(self, seconds: float, *, start_enabled: bool = False) -> None:
        """Poll for up to so many seconds; 0 for never.  Begin with that, or when it has paid."""
        self._longest = seconds
        self._trust = _MAX_CONFIDENCE if start_enabled else 0

    @property
    def seconds(self) -> float:
        """How long to poll now."""
        return self._longest if self._trust > 0 else 0.0

    def came(self, seconds: float, *, slept: bool) -> None:
        """Learn how long it took this time; ``slept`` says that it was not polled for."""
        if seconds <= self._longest * (_WAKE_FACTOR if slept else 1):
            self._trust = min(_MAX_CONFIDENCE, self._trust + 2)
        elif seconds > self._longest * _FAR:
            self._trust = 0
        elif self._trust > 0:
            self._trust -= 1
