"""How a cell is measured: which system runs in which round, until when, and what failures do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import comparison, speed
from benchmarks.catalogue import select_cells
from benchmarks.commands import BenchmarkError, WrongDataError
from benchmarks.comparison import Comparison
from benchmarks.cputime import CpuTime
from benchmarks.images import Images
from benchmarks.loads import Result
from benchmarks.rounds import MAX_SPREAD, RoundLimits, rotated_orders, spread
from benchmarks.runner import Environment
from benchmarks.systems import TITLES, Programs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.cells import Cell
    from benchmarks.outcome import Outcome
    from benchmarks.systems import System

(CELL,) = select_cells("^read-1m$")
LOG: list[str] = []
"""What the fake runners were asked to do."""
FIGURES: dict[System, list[float]] = {}
"""The figures that they still have to give; a negative one is a failure."""
WRONG: set[System] = set()
"""The systems whose disks turn out to be wrong."""


class FakeRunner:
    """Stands for a runner: gives prepared figures."""

    def __init__(self, system: System, _cell: Cell, _environment: Environment) -> None:
        self._system: System = system
        LOG.append(f"new {system}")

    def measure(self) -> tuple[Result, CpuTime]:
        """Give the next figure."""
        figure = FIGURES[self._system].pop(0)
        LOG.append(f"measure {self._system}")
        if figure < 0:
            msg = "it broke"
            raise BenchmarkError(msg)
        return Result(figure, requests=100), CpuTime(1.0, 2.0)

    def verify(self) -> None:
        """Find wrong data, or none."""
        LOG.append(f"verify {self._system}")
        if self._system in WRONG:
            msg = "offset 0"
            raise WrongDataError(msg)

    def finish(self) -> None:
        """Stop."""
        LOG.append(f"finish {self._system}")

    def abort(self) -> None:
        """Stop, whatever the state."""


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "Runner", FakeRunner)
    LOG.clear()
    WRONG.clear()


def compare(figures: Mapping[System, Sequence[float]], limits: RoundLimits) -> Outcome:
    """Measure a cell on systems with prepared figures."""
    FIGURES.clear()
    FIGURES.update({system: list(values) for system, values in figures.items()})
    programs = Programs("", "", {})
    environment = Environment(Path("/nowhere"), Images(Path("/nowhere"), 1), programs, 1.0)
    return Comparison(environment, TITLES, limits).run_cell(CELL, list(figures))


@pytest.mark.usefixtures("_fake")
def test_steady_cell_gets_the_least_rounds() -> None:
    """Systems take turns, and each disk is verified once, after the last round."""
    found = compare({"qedfuse": [10, 10, 10], "qemu": [5, 5, 5]}, RoundLimits(2, 3))
    assert found.figures == {"qedfuse": [10, 10], "qemu": [5, 5]}
    assert [
        *("new qedfuse", "new qemu"),
        *("measure qedfuse", "measure qemu", "measure qemu", "measure qedfuse"),
        *("verify qedfuse", "finish qedfuse", "verify qemu", "finish qemu"),
    ] == LOG
    assert found.work["qemu"].time == CpuTime(2.0, 4.0)
    assert found.work["qemu"].per_request() == CpuTime(0.01, 0.02)


@pytest.mark.usefixtures("_fake")
def test_varying_cell_gets_more_rounds() -> None:
    """A cell is repeated until the figures of its least steady system have settled."""
    qemu = [5, 9, 5, 5, 5, 5, 5]
    found = compare({"qedfuse": [10] * 7, "qemu": qemu}, RoundLimits(2, 7))
    assert found.rounds == 5
    assert found.spread < MAX_SPREAD
    assert compare({"qedfuse": [1, 9, 1, 9]}, RoundLimits(2, 4)).rounds == 4


@pytest.mark.usefixtures("_fake")
def test_system_that_fails_starts_anew() -> None:
    """A failed round has no figure, and the next one has a new runner."""
    found = compare({"qedfuse": [10, 10], "baseline": [-1, 20]}, RoundLimits(2, 2))
    assert found.figures == {"qedfuse": [10, 10], "baseline": [20]}
    assert found.failures == ["baseline failed: it broke"]
    assert LOG.count("new baseline") == 2


@pytest.mark.usefixtures("_fake")
def test_wrong_data_is_recorded() -> None:
    """Wrong data fails the run, unless it is a peer's."""
    WRONG.update({"qedfuse", "qemu"})
    found = compare({"qedfuse": [10], "qemu": [5]}, RoundLimits(1, 1))
    assert found.failures == ["qedfuse held wrong data after the last round: offset 0"]
    assert found.remarks == ["QEMU held wrong data after the last round"]
    assert found.details == ["QEMU: offset 0"]


def test_each_system_runs_first_in_turn() -> None:
    """In as many rounds as there are systems, each system runs once at each position."""
    orders = rotated_orders(["qedfuse", "qemu", "baseline"], 3)
    assert orders == [
        ["qedfuse", "qemu", "baseline"],
        ["qemu", "baseline", "qedfuse"],
        ["baseline", "qedfuse", "qemu"],
    ]
    assert len(rotated_orders(["qedfuse"], 5)) == 5


def test_spread_ignores_the_extremes() -> None:
    """The spread is the distance between the quartiles, as a part of the median."""
    assert spread([100, 90, 110, 1, 1000]) == pytest.approx(0.2)
    assert spread([100, 100]) == 0
    assert spread([5]) == spread([]) == spread([0, 0]) == 0


def test_rounds_until_the_spread_is_small() -> None:
    """A cell gets more rounds while any system's figures vary, up to the limit."""
    limits = RoundLimits(3, 5)
    steady, varying = [100.0, 101, 102], [100.0, 200, 300]
    assert spread(steady) < MAX_SPREAD < spread(varying)
    assert not limits.is_enough(2, [steady])
    assert limits.is_enough(3, [steady, steady])
    assert not limits.is_enough(3, [steady, varying])
    assert not limits.is_enough(4, [varying, steady])
    assert limits.is_enough(5, [varying])
    assert limits.is_enough(3, [])


def test_limits_from_options() -> None:
    """A quick run has no more rounds than the least; an option can only raise the limit."""
    assert speed.round_limits(None, None, quick=False) == (5, 10)
    assert speed.round_limits(None, None, quick=True) == (3, 3)
    assert speed.round_limits(None, 6, quick=True) == (3, 6)
    assert speed.round_limits(12, None, quick=False) == (12, 12)
    assert speed.round_limits(4, 2, quick=False) == (4, 4)
