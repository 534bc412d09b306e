"""Compare the systems in a cell, round by round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from benchmarks.commands import BenchmarkError, WrongDataError
from benchmarks.outcome import Outcome
from benchmarks.rounds import rotated_orders
from benchmarks.runner import Runner
from benchmarks.systems import System

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from benchmarks.cells import Cell
    from benchmarks.rounds import RoundLimits
    from benchmarks.runner import Environment


def systems_of(cell: Cell, wanted: Collection[System]) -> list[System]:
    """Return those of the wanted systems that are measured in a cell."""
    return [
        system
        for system in get_args(System)
        if system in wanted and (system != "single" or cell.stage == "chain")
    ]


class Comparison:
    """Measures cells on several systems.

    Args:
        environment: What the runners share.
        titles: The names of the systems.
        limits: How often each cell is measured.
    """

    def __init__(
        self, environment: Environment, titles: Mapping[System, str], limits: RoundLimits
    ) -> None:
        self._environment: Final = environment
        self._titles: Final = titles
        self._limits: Final = limits

    def run_cell(self, cell: Cell, systems: Sequence[System]) -> Outcome:
        """Measure a cell on all systems; a system that fails starts anew in the next round.

        The disks are verified after the last round.
        """
        outcome = Outcome(cell, titles=self._titles)
        runners = {system: Runner(system, cell, self._environment) for system in systems}
        try:
            for count, order in enumerate(rotated_orders(systems, self._limits.most), 1):
                for system in order:
                    if not _measure_once(runners[system], outcome, system):
                        runners[system].abort()
                        runners[system] = Runner(system, cell, self._environment)
                if self._limits.is_enough(count, outcome.figures.values()):
                    break
            for system, runner in runners.items():
                _finish(runner, outcome, system)
        finally:
            for runner in runners.values():
                runner.abort()
        if cell.stage != "full" or cell.writes:
            self._environment.images.drop(cell.stage)
        return outcome


def _measure_once(runner: Runner, outcome: Outcome, system: System) -> bool:
    """Measure once and record the figure; return False if that failed."""
    try:
        outcome.add(system, *runner.measure())
    except BenchmarkError as error:
        outcome.fail(system, "failed", str(error))
        return False
    return True


def _finish(runner: Runner, outcome: Outcome, system: System) -> None:
    """Verify the disks of a system, and stop its server."""
    try:
        runner.verify()
    except WrongDataError as error:
        outcome.fail(system, "held wrong data after the last round", str(error))
    except BenchmarkError as error:
        outcome.fail(system, "failed", str(error))
        runner.abort()
    try:
        runner.finish()
    except BenchmarkError as error:
        outcome.fail(system, "failed", str(error))
