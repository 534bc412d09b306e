"""What every test gets: silence is tested, leaked handles surface, examples are the same twice."""

from __future__ import annotations

import gc
import logging
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# CI must not fail for a change that has nothing to do with the failure; at home new
# examples are worth having.  No deadline: machines are shared, and time is not tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is for what a shell starts in the background, and for all that this starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # And so it is for what nohup starts.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


class _LogWatcher(logging.Handler):
    """Keeps the records that a user would see."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _watch_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that logs a warning it did not expect, or does not log one it expected."""
    watcher = _LogWatcher()
    logging.getLogger().addHandler(watcher)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(watcher)
    expected = [mark.args[0] for mark in request.node.iter_markers("expect_log")]
    unexpected = [text for text in watcher.texts if not any(part in text for part in expected)]
    missing = [part for part in expected if not any(part in text for text in watcher.texts)]
    assert not unexpected, f"unexpected log: {unexpected}"
    assert not missing, f"not logged: {missing}"


@pytest.fixture(autouse=True, scope="session")
def _cheap_collections() -> None:
    """Leave what the imports made out of the many collections that follow."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Make what a test forgot to close complain during that test, not during another."""
    yield
    gc.collect()
