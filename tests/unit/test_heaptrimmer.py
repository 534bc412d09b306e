"""The heap trimmer returns unused memory to the system, at most once per interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.mount.process import heaptrimmer
from qedfuse.mount.process.heaptrimmer import MIN_INTERVAL_SECONDS, HeapTrimmer

if TYPE_CHECKING:
    import pytest


def test_the_heap_is_trimmed_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap is trimmed at the first call and after an interval, if the C library can."""
    calls: list[int] = []
    now = 0.0
    monkeypatch.setattr(heaptrimmer, "_malloc_trim", calls.append)
    trim = HeapTrimmer(lambda: now)
    for _ in range(3):
        trim()
    assert calls == [0]
    now = MIN_INTERVAL_SECONDS + 1
    trim()
    trim()
    assert calls == [0, 0]
    monkeypatch.setattr(heaptrimmer, "_malloc_trim", None)
    now = 10 * MIN_INTERVAL_SECONDS
    trim()
    assert calls == [0, 0]
