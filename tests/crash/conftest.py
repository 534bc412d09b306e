"""Shared by the crash tests; tells at the end of a run how many states were looked at."""

from __future__ import annotations

import logging
from typing import Final

import pytest

from tests.support.explorer import Exploration

EXPLORED: Final[dict[str, Exploration]] = {}
"""What the tests of this run have looked at, by workload."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts."""
    if EXPLORED:
        total = Exploration()
        terminalreporter.section("crash states")
        for name, found in EXPLORED.items():
            terminalreporter.line(f"{name}: {found}")
            total.add(found)
        terminalreporter.line(f"all: {total}")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Drop the log: where things fail on purpose, what is logged has tests of its own."""
    caplog.set_level(logging.CRITICAL + 1, "qedfuse")
