"""Fuzz mounts: ``python -m tests.fuzz --seconds 3600``, or the cases ``--case 1 --case 7``.

Each case has its own seed.  A failure ends the run with exit code 1, and prints the case and
the command that repeats it; one that depends on the order of threads may need repetitions:

    python -m tests.fuzz --case 1234 --times 20

With ``--target`` the parsers are fuzzed instead, in this process or by atheris:

    python -m tests.fuzz --target all --seconds 600
    python -m tests.fuzz --target image --input 0038000000
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz import corpus
from tests.fuzz.guided import has_atheris, run_guided
from tests.fuzz.inputs import ask_peers, check_one, run_inputs
from tests.fuzz.targets.registry import NAMES, target_named
from tests.fuzz.watched import run_watched

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Run the command, whose arguments are ``words``; the exit code is 1 if there is a finding."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz mounts; with --target, parsers."
    )
    parser.add_argument("--seconds", type=float, default=60, help="start no case later (60)")
    parser.add_argument("--seed", type=int, help="the seed of the first case (random)")
    parser.add_argument(
        "--case", type=int, action="append", help="only the case with this seed; repeatable"
    )
    parser.add_argument("--times", type=int, default=1, help="how often to repeat --case (1)")
    parser.add_argument(
        "--target", choices=("all", *NAMES), action="append", help="fuzz a parser; repeatable"
    )
    parser.add_argument("--inputs", type=int, default=1 << 62, help="inputs for each target")
    parser.add_argument(
        "--engine",
        choices=("atheris", "plain"),
        default="atheris" if has_atheris() else "plain",
        help="what draws the inputs (atheris if it is installed)",
    )
    parser.add_argument("--keep", action="store_true", help="add useful inputs to the corpus")
    parser.add_argument("--ask-qemu", type=int, default=0, help="compare this many with QEMU")
    parser.add_argument("--input", type=bytes.fromhex, help="pass one input to the target")
    given = parser.parse_args(words)
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    try:
        if given.target is not None:
            names = NAMES if "all" in given.target else tuple(given.target)
            for name in names:
                _fuzz_target(name, given, seed)
        else:
            _fuzz_mounts(given, seed)
    except AssertionError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


def _fuzz_mounts(given: argparse.Namespace, seed: int) -> None:
    """Run cases of the fuzzer for mounts.

    Raises:
        AssertionError: A case fails.
    """
    seeds = iter(range(seed, seed + (1 << 32)))
    if given.case is not None:
        seeds = iter(given.case * given.times)
    end = time.monotonic() + given.seconds
    cases = kills = 0
    for number in seeds:
        if given.case is None and time.monotonic() >= end:
            break
        with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-") as directory:
            kills += run_watched(number, Path(directory))
        cases += 1
    first = f" from seed {seed}" if given.case is None else ""
    sys.stdout.write(f"{cases} cases{first}, {kills} kills: nothing found\n")


def _fuzz_target(name: str, given: argparse.Namespace, seed: int) -> None:
    """Fuzz a parser, or pass one input to it.

    Raises:
        AssertionError: An input is a finding.
    """
    if given.input is not None:
        check_one(name, given.input)
        sys.stdout.write(f"{name}: nothing found\n")
        return
    found: list[bytes] = []
    if given.engine == "atheris":
        found, finding = run_guided(name, min(given.inputs, 1 << 31), seed, given.seconds)
        if finding is not None:
            check_one(name, finding)
            msg = f"{name}: found an input that fails only there: {finding.hex()}"
            raise AssertionError(msg)
        text = f"{len(found)} inputs reached new code"
    else:
        text = f"{run_inputs(name, given.inputs, seed, given.seconds)} inputs"
    if given.ask_qemu and target_named(name).ask_peer is not None:
        text += f", QEMU agrees on {ask_peers(name, given.ask_qemu, seed)}"
    if given.keep:
        from tests.fuzz.reduction import reduced  # noqa: PLC0415  only to change the corpus

        corpus.save(name, reduced(target_named(name), corpus.load(name), found))
    sys.stdout.write(f"{name}: {text} from seed {seed}: nothing found\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
