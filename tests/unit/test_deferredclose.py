"""Files that threads use are closed once, by the last user."""

from __future__ import annotations

from qedfuse.util.deferredclose import DeferredClose


def test_the_last_user_closes() -> None:
    """A close during a use takes effect at its end; later users are refused."""
    closed: list[str] = []
    files = DeferredClose(lambda: closed.append("closed"))
    assert files.enter()
    assert files.enter()
    files.leave()
    files.close()
    assert closed == []
    assert not files.enter()
    files.close()
    assert closed == []
    files.leave()
    assert closed == ["closed"]


def test_a_close_without_users_takes_effect_before_it_returns() -> None:
    """Uses that have ended do not keep the files open, and a second close does nothing."""
    closed: list[str] = []
    files = DeferredClose(lambda: closed.append("closed"))
    assert files.enter()
    files.leave()
    assert closed == []
    files.close()
    files.close()
    assert closed == ["closed"]
