"""Fuzzes mounts, on demand: ``python -m tests.fuzz --seconds 3600``.

Each case has a seed of its own.  What it finds ends the run with exit code 1, and prints the
case and how to see it again; what depends on the order of threads may need some repetitions:

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
    """Run the command; the exit code is 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz mounts.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--seed", type=int, help="the seed of the first case (by chance)")
    parser.add_argument("--case", type=int, help="only the case with this seed")
    parser.add_argument("--times", type=int, default=1, help="how often to repeat --case (1)")
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    seeds = iter(range(seed, seed + (1 << 32)))
    if given.case is not None:
        seeds = iter([given.case] * given.times)
    end = time.monotonic() + given.seconds
    count = 0
    for number in seeds:
        if given.case is None and time.monotonic() >= end:
            break
        with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-") as directory:
            try:
                run_watched(number, Path(directory))
            except AssertionError as error:
                sys.stdout.write(f"{error}\n")
                return 1
        count += 1
    sys.stdout.write(f"{count} cases from seed {seed}: nothing found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
