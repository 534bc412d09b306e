"""How fast a disk is through qedfuse, beside QEMU's own FUSE export and what FUSE can do.

    benchmarks/run.sh                     every cell, in about half an hour
    benchmarks/run.sh --quick             every cell, in about five minutes
    benchmarks/run.sh --cells randread    the cells whose names contain that

"us" is the command qedfuse; "peer" is qemu-storage-daemon with a writable FUSE export of
an image with the same content; "limit" is benchmarks/passthrough.c on a flat file with
that content.  They take turns, in another order each round.  What counts is the median of
the rounds and the ratio of two medians, more than one meaning that qedfuse is faster.
After its last round each disk is compared with what it should hold.

Ends with 0 also where targets are missed, for that depends on the machine; with 1 when a
measurement failed or a byte was wrong; then the table is printed all the same.  QEMU's
failures and wrong bytes are only noted.
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
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar, get_args

from benchmarks.cells import Cell, Fio
from benchmarks.contest import Place, Runner
from benchmarks.images import Images
from benchmarks.report import Outcome, as_json, facts, markdown, number, plot
from benchmarks.servers import BenchmarkError, Programs, Who, run
from benchmarks.table import CELLS, chosen
from qedfuse.mount.system.mounttable import read_mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDS, SECONDS, SIZE_MIB = 5, 2.0, 1024
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SIZE_MIB = 3, 0.4, 256
ROOT: Final = Path(__file__).resolve().parents[1]

T = TypeVar("T")


def compile_limit(directory: Path) -> str:
    """Build the pass-through and give its path.

    Raises:
        BenchmarkError: It does not compile.
    """
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "fuse3"))
    program = str(directory / "passthrough")
    source = str(Path(__file__).with_name("passthrough.c"))
    run("gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", program, source, *flags)
    return program


def takes_part(cell: Cell) -> list[Who]:
    """Give who is measured in a cell."""
    return [who for who in get_args(Who) if who != "single" or cell.stage == "chain"]


def turns(everybody: Sequence[T], rounds: int) -> list[list[T]]:
    """Give the order of each round: whoever was first is the last in the next one."""
    orders = []
    for number_ in range(rounds):
        first = number_ % len(everybody)
        orders.append([*everybody[first:], *everybody[:first]])
    return orders


def compete(cell: Cell, everybody: Sequence[Who], place: Place, rounds: int) -> Outcome:
    """Measure one cell; who fails comes back in the next round."""
    outcome = Outcome(cell)
    contestants = {who: Runner(who, cell, place) for who in everybody}
    try:
        for step, order in enumerate(turns(everybody, rounds), 1):
            for who in order:
                if not _take_turn(contestants[who], outcome, last=step == rounds):
                    contestants[who].give_up()
                    contestants[who] = Runner(who, cell, place)
        for who, contestant in contestants.items():
            try:
                contestant.leave()
            except BenchmarkError as error:
                outcome.fail(who, f"failed: {error}")
    finally:
        for contestant in contestants.values():
            contestant.give_up()
    if cell.stage != "full" or (isinstance(cell.load, Fio) and cell.load.writes):
        place.images.drop(cell.stage)
    return outcome


def _take_turn(contestant: Runner, outcome: Outcome, *, last: bool) -> bool:
    """Measure once; False if that failed."""
    who = contestant.who
    try:
        figure = contestant.measure(last=last)
    except BenchmarkError as error:
        outcome.fail(who, f"failed: {error}")
        return False
    outcome.figures.setdefault(who, []).append(figure)
    if contestant.wrong:
        outcome.fail(who, f"wrong data: {contestant.wrong}")
    return True


def _line(outcome: Outcome) -> str:
    """Say in one line what came out."""
    parts = [f"{who} {number(outcome.median(who) or 0)}" for who in outcome.figures]
    parts.append(outcome.cell.unit)
    for other in get_args(Who):
        ratio = outcome.ratio(other)
        if other != "us" and ratio is not None:
            parts.append(f"us/{other} {ratio:.2f}")
    parts += [f"MISSED: {what}" for what in outcome.missed()]
    parts += [f"NOTE: {what}" for what in outcome.remarks]
    parts += [f"FAILED: {what}" for what in outcome.failures]
    return f"{outcome.cell.name}: {'  '.join(parts)}"


def _list() -> None:
    """Print the cells and their targets."""
    for cell in CELLS:
        targets = [f"peer x {cell.peer:g}" if cell.peer is not None else ""]
        targets.append(f"limit x {cell.limit:g}" if cell.limit is not None else "")
        print(f"{cell.name:24} {targets[0]:10} {targets[1]:11} {cell.title}")


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
    parser.add_argument("--rounds", type=int, help=f"of each cell ({ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"of each measurement ({SECONDS:g})")
    parser.add_argument("--size", type=int, help=f"of a disk, in MiB ({SIZE_MIB})")
    parser.add_argument(
        "--who",
        default="us,peer,limit,single",
        help="some of us, peer, limit, single (qedfuse on one image, beside the chain)",
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where 20 GiB are free")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the ratios")
    arguments = parser.parse_args()
    unknown = set(arguments.who.split(",")) - set(get_args(Who))
    if unknown:
        parser.error(f"--who: found {', '.join(sorted(unknown))}, expected {get_args(Who)}")
    return arguments


def main() -> None:
    """Read the arguments, measure, and show what came out."""
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
    print("\n" + table)
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.json:
        text = json.dumps(as_json(outcomes, about), indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        plot(arguments.plot, outcomes)
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def _measure(arguments: argparse.Namespace) -> tuple[list[Outcome], dict[str, str]]:
    """Measure the cells that are wanted; give them and what they were measured on.

    Raises:
        BenchmarkError: The set-up failed.
        ValueError: No cell is wanted.
    """
    cells = chosen(arguments.cells)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    size = arguments.size or (QUICK_SIZE_MIB if arguments.quick else SIZE_MIB)
    qedfuse = os.environ.get("QEDFUSE") or str(Path(sys.executable).with_name("qedfuse"))
    wanted = arguments.who.split(",")
    start = time.monotonic()
    outcomes: list[Outcome] = []
    directory = Path(tempfile.mkdtemp(prefix="qedfuse-speed-", dir=arguments.dir))
    try:
        settings = f"{rounds} rounds of {seconds:g} s, disks of {size} MiB"
        about = facts(directory, qedfuse, settings)
        programs = Programs(qedfuse, compile_limit(directory))
        place = Place(directory, Images(directory, size << 20), programs, seconds)
        for cell in cells:
            if cell.loop and os.geteuid() != 0:
                print(f"{cell.name}: left out, because only root attaches loop devices")
                continue
            everybody = [who for who in takes_part(cell) if who in wanted]
            began = time.monotonic()
            outcomes.append(compete(cell, everybody, place, rounds))
            print(f"{_line(outcomes[-1])}  ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        _remove(directory)
    about["settings"] += f"; took {(time.monotonic() - start) / 60:.0f} minutes"
    return outcomes, about


def _remove(directory: Path) -> None:
    """Delete everything, unless something is mounted there still."""
    if any(mount.path.startswith(f"{directory}/") for mount in read_mounts()):
        print(f"run.sh: left behind, because it is in use: {directory}", file=sys.stderr)
        return
    with suppress(subprocess.SubprocessError):
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
