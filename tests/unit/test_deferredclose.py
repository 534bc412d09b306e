"""Files that threads use are closed once, by the last user."""

from __future__ import annotations

import pytest

from qedfuse.errors import HostError
from qedfuse.util.deferredclose import DeferredClose, close_all


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


def test_files_after_one_that_fails_are_closed() -> None:
    """A close that fails keeps no other file open, and its error is raised."""
    closed: list[int] = []

    class File:
        """A file that records its close."""

        def __init__(self, number: int) -> None:
            """Fail to close if the number is 1 or 2."""
            self._number = number

        def close(self) -> None:
            """Record the close, and fail perhaps."""
            closed.append(self._number)
            if self._number in {1, 2}:
                msg = f"close {self._number}"
                raise HostError(msg)

    with pytest.raises(HostError, match="close 2"):
        close_all([File(number) for number in range(4)])
    assert closed == [0, 1, 2, 3]
