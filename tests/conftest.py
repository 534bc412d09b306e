"""Checks that surround every test: logged warnings, injected faults and leaked handles.

Also the hypothesis profiles, and the signal handlers that a test process starts with.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import settings

from tests.support.hostfiles import take_unstruck
from tests.support.mountnamespace import enter_own_namespace
from tests.support.text import without_temporary_directories

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

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


def pytest_configure(config: pytest.Config) -> None:
    """Separate the mounts of test processes that run in parallel."""
    if hasattr(config, "workerinput"):
        enter_own_namespace()


_IS_SKIPPED: Final = pytest.StashKey[bool]()
"""Whether the body of a test was not run to its end because something that it needs is missing."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note for the fixtures of a test whether it was skipped."""
    report = yield
    if report.skipped:
        item.stash[_IS_SKIPPED] = True
    return report


class _LogWatcher(logging.Handler):
    """Keeps the text of every record of level WARNING and above.

    Attributes:
        texts: Level, logger and message of each record, for people.
        messages: The messages alone.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of one record."""
        # Formatted now, because the arguments of a record may change later.
        message = record.getMessage()
        self.texts.append(f"{record.levelname} {record.name}: {message}")
        self.messages.append(message)


@pytest.fixture(autouse=True)
def _watch_log(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a test that logs an unexpected warning, or does not log an expected one.

    Only the message counts: not the name of the logger, and no temporary directory.  A test that is
    skipped need not log anything.
    """
    watcher = _LogWatcher()
    # A test that has called `main` of qedimg has silenced some loggers for its process.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("qedfuse."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger().addHandler(watcher)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(watcher)
    expected = [mark.args[0] for mark in request.node.iter_markers("expect_log")]
    base = tmp_path_factory.getbasetemp()
    messages = [without_temporary_directories(message, base) for message in watcher.messages]
    unexpected = [
        text
        for text, message in zip(watcher.texts, messages, strict=True)
        if not any(part in message for part in expected)
    ]
    missing = [part for part in expected if not any(part in message for message in messages)]
    assert not unexpected, f"unexpected log: {unexpected}"
    assert not missing or request.node.stash.get(_IS_SKIPPED, False), f"not logged: {missing}"


@pytest.fixture(autouse=True)
def _every_fault_strikes() -> Iterator[None]:
    """Fail a test with a fault that no call met, or with a held call that was never made."""
    take_unstruck()
    yield
    unstruck = take_unstruck()
    assert not unstruck, f"never struck: {unstruck}"


@pytest.fixture(autouse=True, scope="session")
def _collect_all_at_end() -> Iterator[None]:
    """Collect what has survived the tests as well, when all are over."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    """Collect garbage after each test, so that a handle it leaked warns in that test.

    Only objects that are younger than the test are examined: that takes a tenth of the time.
    """
    gc.freeze()
    yield
    gc.collect()
