"""Explores millions of crash states on demand: ``python -m tests.crash.explore``.

It runs all cases again and again, each time with another seed, and prints how many states it
has judged.  For each kind of violation it prints the command that shows the state again:

    python -m tests.crash.explore --workload reuse --seed 7 --prefix 31 --choice 402
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.crash.cases import CASES
from tests.crash.workloads import run_case
from tests.support.explorer import Exploration, Explorer

if TYPE_CHECKING:
    from tests.crash.cases import Case

STATES_PER_WORKLOAD: int = 20_000
"""How many states of power failures are judged of one case with one seed."""


def main() -> int:
    """Run the command and return its exit code, 1 if a violation was found."""
    parser = argparse.ArgumentParser(description="Explore crash states.")
    parser.add_argument("--states", type=int, default=1_000_000, help="about how many states")
    parser.add_argument("--seed", type=int, help="the first seed (default: random)")
    parser.add_argument("--workload", choices=[case.name for case in CASES], help="only this case")
    parser.add_argument("--prefix", type=int, help="only the crash point after this many changes")
    parser.add_argument("--choice", type=int, help="only this state of that crash point")
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    cases = [case for case in CASES if given.workload in {None, case.name}]
    if given.prefix is not None:
        if len(cases) != 1:
            parser.error("--prefix needs --workload")
        return trio.run(show, cases[0], seed, given.prefix, given.choice)
    say(f"seed {seed}")
    return explore(cases, seed, given.states)


def say(line: str) -> None:
    """Print a line and flush, so that a file with the output is up to date."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def explore(cases: list[Case], seed: int, states: int) -> int:
    """Explore until ``states`` states were judged; return the exit code."""
    total, began = Exploration(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for number in itertools.count(seed):
            for case in cases:
                workload = run_case(case, number)
                explorer = Explorer(
                    case.name, number, workload.history, workload.bases, scratch=scratch
                )
                found = trio.run(explorer.explore, STATES_PER_WORKLOAD)
                found.misread += workload.history.misread
                if found.violations or found.misread:
                    say(f"{case.name}, seed {number}: {found.report()}")
                total.add(found)
                if total.states >= states:
                    break
            else:
                say(f"{total}, {time.monotonic() - began:.0f} s")
                continue
            break
    say(f"{total}, {time.monotonic() - began:.0f} s, {total.violated} bad")
    return 1 if total.violations or total.misread else 0


async def show(case: Case, seed: int, prefix: int, choice: int | None) -> int:
    """Judge one state again and print its problems; write it to a file; return the exit code.

    ``choice`` None is the state that a killed process leaves after ``prefix`` changes.
    """
    workload = await trio.to_thread.run_sync(run_case, case, seed)
    explorer = Explorer(case.name, seed, workload.history, workload.bases)
    point = next(point for point in explorer.crash_points() if point.count == prefix)
    failure = None
    state = point.prefix()
    if choice is not None:
        failure = point.power_failure()
        choices = failure.choices(explorer.random(prefix))
        state = failure.state(next(itertools.islice(choices, choice, None)))
    problems = await explorer.judge(state, prefix, failure)
    path = Path(tempfile.gettempdir()) / "crash-state.qed"
    path.write_bytes(explorer.content(state))
    for number, change in enumerate(workload.file.changes[max(0, prefix - 12) : prefix]):
        say(f"{max(0, prefix - 12) + number} {describe(change)}")
    not_durable = failure.not_durable.tolist() if failure else []
    say(f"{path}: {state.length} bytes; not durable: sectors {not_durable}")
    say("\n".join(problems) or "nothing wrong")
    return 1 if problems else 0


def describe(change: object) -> str:
    """Return the kind and the fields of a change, with the length of its data."""
    fields = change._asdict()  # type: ignore[attr-defined]
    fields = {name: len(value) if name == "data" else value for name, value in fields.items()}
    return f"{type(change).__name__} {fields}"


if __name__ == "__main__":
    sys.exit(main())
