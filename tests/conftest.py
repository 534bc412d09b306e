"""Checks that surround every test: logged warnings, injected faults and leaked handles.

Also the hypothesis profiles, and the signal handlers that a test process starts with.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.hostfiles import take_unstruck

if TYPE_CHECKING:
    from collections.abc import Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in a background job, and all its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # nohup(1) ignores SIGHUP in the same way.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# CI runs the same examples each time, so that a failure there belongs to the change under test;
# other runs draw new examples.  No deadline: machines are shared, and speed is not tested.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


class _LogWatcher(logging.Handler):
    """Keeps the text of every record of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of one record."""
        self.texts.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _watch_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that logs an unexpected warning, or does not log an expected one."""
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


@pytest.fixture(autouse=True)
def _every_fault_strikes() -> Iterator[None]:
    """Fail a test with a fault that no call met, or with a held call that was never made."""
    take_unstruck()
    yield
    unstruck = take_unstruck()
    assert not unstruck, f"never struck: {unstruck}"


@pytest.fixture(autouse=True, scope="session")
def _freeze_imported_objects() -> None:
    """Exclude the objects of imported modules from the collections that follow each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    """Collect garbage after each test, so that a handle it leaked warns in that test."""
    yield
    gc.collect()
