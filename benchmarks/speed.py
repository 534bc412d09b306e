"""Measure the speed of a disk through qedfuse, QEMU's own FUSE export, and plain FUSE.

    benchmarks/run.sh                     every cell, in one to two hours
    benchmarks/run.sh --quick             every cell, in about ten minutes
    benchmarks/run.sh --cells randread    the cells whose names contain "randread"

The system "qedfuse" is the command qedfuse; "qemu" is qemu-storage-daemon with a writable
FUSE export of an image with the same content; "qemu-root" is the same program of another
version, from the root directory that --peer-root names; "baseline" is
benchmarks/passthrough.c on a flat file with that content.  They are measured in alternation,
in another order each round.  A cell is repeated until the distance between the quartiles of
each system's figures is less than 15 % of their median.  The result is the median of the
rounds and the ratio of two medians; a ratio above one means that qedfuse is faster.  A target
for QEMU is a target for the faster one.  After the last round the content of each disk is
verified.  A second table has the CPU time that the servers used.

The exit code is 1 if a measurement failed or a byte was wrong, and the table is printed
nevertheless.  Missed targets, which depend on the machine, and QEMU's failures and wrong
bytes are only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, get_args

from benchmarks.catalogue import CELLS, select_cells
from benchmarks.commands import BenchmarkError, run
from benchmarks.comparison import Comparison, systems_of
from benchmarks.images import Images
from benchmarks.machine import facts, peer_titles
from benchmarks.peerroot import storage_daemon
from benchmarks.report import as_json, markdown, mean_line, number, plot
from benchmarks.rounds import RoundLimits
from benchmarks.runner import Environment
from benchmarks.systems import TITLES, Programs, System
from qedfuse.mount.system.mounttable import read_mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.outcome import Outcome

ROUNDS, MAX_ROUNDS, SECONDS, SIZE_MIB = 5, 10, 2.0, 1024
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE_MIB = 3, 0.4, 256
ROOT: Final = Path(__file__).resolve().parents[1]


def compile_baseline(directory: Path) -> str:
    """Build the pass-through file system, and return the path of the program.

    Raises:
        BenchmarkError: The program does not compile.
    """
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "fuse3"))
    program = str(directory / "passthrough")
    source = str(Path(__file__).with_name("passthrough.c"))
    run("gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", program, source, *flags)
    return program


def _line(outcome: Outcome) -> str:
    """Return the result of a cell as a line."""
    parts = [f"{system} {number(outcome.median(system) or 0)}" for system in outcome.figures]
    parts.append(f"{outcome.cell.unit} in {outcome.rounds} rounds, spread {outcome.spread:.0%}")
    for other in get_args(System):
        ratio = outcome.ratio(other)
        if other != "qedfuse" and ratio is not None:
            parts.append(f"qedfuse/{other} {ratio:.2f}")
    parts += [f"MISSED: {what}" for what in outcome.missed()]
    parts += [f"NOTE: {what}" for what in outcome.remarks]
    parts += [f"DETAIL: {what}" for what in outcome.details]
    parts += [f"FAILED: {what}" for what in outcome.failures]
    return f"{outcome.cell.name}: {'  '.join(parts)}"


def _list() -> None:
    """Print the cells and their targets."""
    for cell in CELLS:
        target = cell.baseline_target
        baseline = f"baseline x {target:g}" if target is not None else ""
        print(f"{cell.name:26} QEMU x {cell.peer_target:<4g} {baseline:15} {cell.title}")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="show the cells and their targets")
    parser.add_argument("--cells", metavar="REGEX", help="only the cells with such names")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds, small disks")
    parser.add_argument("--rounds", type=int, help=f"of each cell, at least ({ROUNDS})")
    parser.add_argument(
        "--max-rounds",
        type=int,
        help=f"of a cell whose figures vary ({MAX_ROUNDS}; with --quick the same as --rounds)",
    )
    parser.add_argument("--seconds", type=float, help=f"of each measurement ({SECONDS:g})")
    parser.add_argument("--size", type=int, help=f"of a disk, in MiB ({SIZE_MIB})")
    parser.add_argument(
        "--systems",
        default=",".join(get_args(System)),
        help=f"some of {', '.join(get_args(System))} (qedfuse on one image, beside the chain)",
    )
    parser.add_argument(
        "--peer-root",
        type=Path,
        metavar="DIR",
        help="measure the qemu-storage-daemon of this root directory too (Debian 13's, say)",
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where 30 GiB are free")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the ratios")
    arguments = parser.parse_args()
    unknown = set(arguments.systems.split(",")) - set(get_args(System))
    if unknown:
        parser.error(f"--systems: found {', '.join(sorted(unknown))}, expected {get_args(System)}")
    return arguments


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    arguments = _arguments()
    if arguments.list:
        _list()
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        outcomes, about = _measure(arguments)
    except (BenchmarkError, OSError, ValueError) as error:
        sys.exit(f"run.sh: {error}")
    except KeyboardInterrupt:
        sys.exit("run.sh: interrupted")
    table = markdown(outcomes, about)
    print(f"\n{table}\n{mean_line(outcomes)}")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.json:
        text = json.dumps(as_json(outcomes, about), indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        plot(arguments.plot, outcomes)
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def round_limits(rounds: int | None, most: int | None, *, quick: bool) -> RoundLimits:
    """Return the limits from the options, each of which may be missing."""
    least = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    return RoundLimits(least, max(least, most or (least if quick else MAX_ROUNDS)))


def _peers(root: Path | None) -> dict[System, Sequence[str]]:
    """Return the commands of QEMU's programs.

    Raises:
        BenchmarkError: There is none in ``root``.
    """
    peers: dict[System, Sequence[str]] = {"qemu": ["qemu-storage-daemon"]}
    if root is not None:
        peers["qemu-root"] = storage_daemon(root)
    return peers


def _measure(arguments: argparse.Namespace) -> tuple[list[Outcome], dict[str, str]]:
    """Measure the selected cells; return their results, and a description of the machine.

    Raises:
        BenchmarkError: The set-up failed.
        ValueError: No cell is selected.
    """
    cells = select_cells(arguments.cells)
    limits = round_limits(arguments.rounds, arguments.max_rounds, quick=arguments.quick)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    size = arguments.size or (QUICK_SIZE_MIB if arguments.quick else SIZE_MIB)
    qedfuse = os.environ.get("QEDFUSE") or str(Path(sys.executable).with_name("qedfuse"))
    peers = _peers(arguments.peer_root)
    titles = {**TITLES, **peer_titles(peers)}
    wanted = set(arguments.systems.split(",")) & {"qedfuse", "baseline", "single", *peers}
    start = time.monotonic()
    outcomes: list[Outcome] = []
    directory = Path(tempfile.mkdtemp(prefix="qedfuse-speed-", dir=arguments.dir))
    try:
        rounds = f"{limits.least} to {limits.most}" if limits.most > limits.least else limits.least
        settings = f"{rounds} rounds of {seconds:g} s, disks of {size} MiB"
        about = facts(directory, qedfuse, settings, peers.values())
        programs = Programs(qedfuse, compile_baseline(directory), peers)
        environment = Environment(directory, Images(directory, size << 20), programs, seconds)
        comparison = Comparison(environment, titles, limits)
        for cell in cells:
            if cell.loop and os.geteuid() != 0:
                print(f"{cell.name}: skipped, because only root can attach loop devices")
                continue
            began = time.monotonic()
            outcomes.append(comparison.run_cell(cell, systems_of(cell, wanted)))
            print(f"{_line(outcomes[-1])}  ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        _remove(directory)
    about["settings"] += f"; took {(time.monotonic() - start) / 60:.0f} minutes"
    return outcomes, about


def _remove(directory: Path) -> None:
    """Delete the directory, unless something is still mounted in it."""
    if any(mount.path.startswith(f"{directory}/") for mount in read_mounts()):
        print(f"run.sh: left behind, because it is in use: {directory}", file=sys.stderr)
        return
    with suppress(subprocess.SubprocessError):
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
