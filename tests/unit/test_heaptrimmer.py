"""Memory that is not in use goes back to the system, but not at each flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.mount.process import heaptrimmer
from qedfuse.mount.process.heaptrimmer import MIN_INTERVAL_SECONDS, HeapTrimmer

if TYPE_CHECKING:
    import pytest


def test_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time, and then when some time has gone by; nowhere if the C library cannot."""
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
