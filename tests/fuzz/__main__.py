"""Fuzz mounts: ``python -m tests.fuzz --seconds 3600``, or the cases ``--case 1 --case 7``.

Each case has its own seed.  A failure ends the run with exit code 1, and prints the case and
the command that repeats it; one that depends on the order of threads may need repetitions:

    python -m tests.fuzz --case 1234 --times 20
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.watched import run_watched


def main() -> int:
    """Run the command; the exit code is 1 if a case fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz mounts.")
    parser.add_argument("--seconds", type=float, default=60, help="start no case later (60)")
    parser.add_argument("--seed", type=int, help="the seed of the first case (random)")
    parser.add_argument(
        "--case", type=int, action="append", help="only the case with this seed; repeatable"
    )
    parser.add_argument("--times", type=int, default=1, help="how often to repeat --case (1)")
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    seeds = iter(range(seed, seed + (1 << 32)))
    if given.case is not None:
        seeds = iter(given.case * given.times)
    end = time.monotonic() + given.seconds
    cases = kills = 0
    for number in seeds:
        if given.case is None and time.monotonic() >= end:
            break
        with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-") as directory:
            try:
                kills += run_watched(number, Path(directory))
            except AssertionError as error:
                sys.stdout.write(f"{error}\n")
                return 1
        cases += 1
    first = f" from seed {seed}" if given.case is None else ""
    sys.stdout.write(f"{cases} cases{first}, {kills} kills: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
