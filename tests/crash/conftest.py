"""Fixtures of the crash tests, and a summary of how many states a run has judged."""

from __future__ import annotations

import logging
from typing import Final

import pytest

from tests.support.explorer import Exploration

EXPLORED: Final[dict[str, Exploration]] = {}
"""The states that this run has judged, by case."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many states were judged, for each case and in all."""
    if EXPLORED:
        total = Exploration()
        terminalreporter.section("crash states")
        for name, found in EXPLORED.items():
            terminalreporter.line(f"{name}: {found}")
            total.add(found)
        terminalreporter.line(f"all: {total}")


@pytest.fixture
def no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Drop all log records: other tests cover what is logged about failures."""
    caplog.set_level(logging.CRITICAL + 1, "qedfuse")
