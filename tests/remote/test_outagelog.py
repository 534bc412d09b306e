"""The log of outages names each outage once, and is not filled by a server that fails at times."""

from __future__ import annotations

import logging

import pytest

from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.remote import outagelog
from qedfuse.remote.outagelog import OutageLog

CANNOT = "what is not in the cache cannot be read"


class Clock:
    """Replaces the module ``time``."""

    now = 0.0

    def monotonic(self) -> float:
        """Return the time that the test has set."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """Give the clock of the log."""
    caplog.set_level(logging.CRITICAL, "")
    caplog.set_level(logging.WARNING, outagelog.__name__)
    clock = Clock()
    monkeypatch.setattr(outagelog, "time", clock)
    return clock


@pytest.mark.expect_log(CANNOT)
@pytest.mark.expect_log("answers again")
def test_frequent_outages_are_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Outages within a minute are logged once; the errors of the others are left to requests."""
    log = OutageLog("x", CANNOT)
    for second in range(0, 70, 10):
        clock.now = second
        for number in range(3):
            error = RemoteError(f"x: {second} {number}")
            log.failed(error)
            assert error.is_logged is error.again().is_logged is (second in {0, 60})
        log.answered()
        log.answered()
    expected = [f"x: 0 0; {CANNOT}", "x: answers again", f"x: 60 0; {CANNOT}", "x: answers again"]
    assert caplog.messages == expected


@pytest.mark.expect_log(CANNOT)
def test_a_change_during_an_outage_is_logged(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A change of the object is logged beside an outage, although both end together."""
    clock.now = 5.0
    log = OutageLog("x", CANNOT)
    log.failed(RemoteError("x: out"))
    log.failed(ObjectChangedError("x: changed"))
    log.failed(ObjectChangedError("x: changed"))
    assert caplog.messages == [f"x: out; {CANNOT}", f"x: changed; {CANNOT}"]


@pytest.mark.expect_log(CANNOT)
@pytest.mark.expect_log("answers again")
def test_a_late_answer_does_not_end_an_outage(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer to a request that was sent before an outage began does not change the outage."""
    clock.now = 5.0
    log = OutageLog("x", CANNOT)
    log.failed(ObjectChangedError("x: changed"))
    log.answered(4.0)
    log.failed(ObjectChangedError("x: changed"))
    assert caplog.messages == [f"x: changed; {CANNOT}"]
    log.answered(6.0)
    assert caplog.messages[1:] == ["x: answers again"]


@pytest.mark.expect_log(CANNOT)
@pytest.mark.expect_log("answers again")
def test_the_end_of_several_outages_is_logged_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The end is logged if any of the outages was logged, even if the last one was not."""
    clock.now = 5.0
    log = OutageLog("x", CANNOT)
    log.failed(RemoteError("x: out"))
    log.failed(ObjectChangedError("x: changed"))
    unlogged = RemoteError("x: out again")
    log.failed(unlogged)
    assert not unlogged.is_logged
    log.answered()
    log.answered()
    expected = [f"x: out; {CANNOT}", f"x: changed; {CANNOT}", "x: answers again"]
    assert caplog.messages == expected
