"""Measure the speed and the memory of qedimg's commands, beside those of qemu-img.

    benchmarks/toolbox.sh                     every task, in about half an hour
    benchmarks/toolbox.sh --quick             smaller disks and three rounds
    benchmarks/toolbox.sh --tasks convert     the tasks whose names contain "convert"

qemu-img's `convert` does not flush the copy to the host's disk by default; both programs are
measured with and without the flush.  They are measured in alternation, in another order each
round.  Times are of whole processes, from start to end; sources are in the host's page cache
unless the task says otherwise.  The result is the ratio of two medians; a ratio above one
means that qedimg is faster.  After the last round the created files are verified.

The exit code is 1 if a measurement failed or a byte was wrong.  Missed targets, which depend
on the machine, are only printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.commands import BenchmarkError, run
from benchmarks.machine import facts
from benchmarks.pagecache import cache_file, evict_file, sync_file
from benchmarks.report import number
from benchmarks.rounds import rotated_orders
from benchmarks.toolfiles import Files
from benchmarks.tooltasks import (
    LEAKS_CODE,
    MIB,
    MISCOUNTED_BYTES,
    TASKS,
    Outcome,
    Task,
    as_json,
    markdown,
)
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

ROUNDS, SIZE, LARGE = 5, "8G", "1T"
QUICK_ROUNDS, QUICK_SIZE, QUICK_LARGE = 3, "256M", "128G"
ROOT: Final = Path(__file__).resolve().parents[1]
TASK_TIMEOUT_SECONDS: Final = 1800.0


class Bench:
    """Measures tasks on files."""

    def __init__(self, files: Files, qedimg: Sequence[str]) -> None:
        self._files = files
        self._programs = {"qedimg": list(qedimg), "qemu-img": ["qemu-img"]}

    def run_task(self, task: Task, rounds: int) -> Outcome:
        """Measure a task with both programs in alternation, then verify what they created."""
        outcome = Outcome(task)
        arguments_by_system = {"qedimg": task.qedimg, "qemu-img": task.qemu_img}
        commands = {
            system: self._command(task, system, words)
            for system, words in arguments_by_system.items()
            if words
        }
        if task.expected:
            # The other images have hardly any data, and their tables are cached already.
            cache_file(self._files.path(task.source))
        for order in rotated_orders(list(commands), rounds):
            for system in order:
                self._measure(outcome, system, commands[system])
        try:
            self._verify(task, commands)
        except (BenchmarkError, ValueError) as error:
            outcome.failures.append(str(error))
        finally:
            for system in commands:
                self._target(task, system).unlink(missing_ok=True)
        return outcome

    def _target(self, task: Task, system: str) -> Path:
        return self._files.directory / f"{task.name}-{system}.{task.target or 'none'}"

    def _command(self, task: Task, system: str, words: str) -> list[str]:
        source = self._files.path(task.source) if task.source else Path()
        placeholders = {
            "source": source,
            "target": self._target(task, system),
            "directory": self._files.directory,
        }
        return [*self._programs[system], *(word.format(**placeholders) for word in words.split())]

    def _measure(self, outcome: Outcome, system: str, command: Sequence[str]) -> None:
        target = self._target(outcome.task, system)
        target.unlink(missing_ok=True)
        if outcome.task.cold:
            evict_file(self._files.path(outcome.task.source))
        try:
            launcher = (sys.executable, "-m", "benchmarks.launch")
            output = run(*launcher, *command, seconds=TASK_TIMEOUT_SECONDS).split()
        except BenchmarkError as error:
            outcome.failures.append(f"{system}: {error}")
            return
        seconds, _busy, memory, code = map(float, output)
        if code and (system == "qedimg" or code != outcome.task.qemu_img_code):
            outcome.failures.append(f"{system}: {shlex.join(command)}: exit code {code:.0f}")
            return
        outcome.seconds.setdefault(system, []).append(seconds)
        outcome.memory.setdefault(system, []).append(memory)
        if target.exists():
            # The next program must not wait for the writeback of this program's data.
            sync_file(target)

    def _verify(self, task: Task, commands: Mapping[str, Sequence[str]]) -> None:
        """Verify what the programs have created or printed.

        Raises:
            BenchmarkError: A file has other content than expected, or is damaged.
            ValueError: The maps differ.
        """
        if task.name == "map-json":
            same_maps(commands["qedimg"], commands["qemu-img"])
        if not task.target:
            return
        for system in commands:
            target = self._target(task, system)
            if not target.exists():
                continue
            if task.target == "qed":
                check(target)
            if task.expected:
                expected = str(self._files.path(task.expected))
                forms = ("-f", task.target, "-F", "raw")
                run(*("qemu-img", "compare", "-q", *forms, str(target), expected), seconds=300)


def check(image: Path) -> None:
    """Check an image with qemu-img.

    Raises:
        BenchmarkError: The image has errors, or leaks that are not due to QEMU's wrong count.
    """
    done = subprocess.run(
        ["qemu-img", "check", "-q", "-f", "qed", str(image)], capture_output=True, check=False
    )
    known = image.stat().st_size >= MISCOUNTED_BYTES and done.returncode == LEAKS_CODE
    if done.returncode and not known:
        msg = f"{image.name}: qemu-img check ended with {done.returncode}: {done.stderr!r}"
        raise BenchmarkError(msg)


def map_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the extents of a JSON map that has one on each line."""
    for line in lines:
        text = line.strip().removeprefix("[").removesuffix("]").rstrip(",")
        if text:
            yield json.loads(text)


def same_maps(qedimg: Sequence[str], qemu_img: Sequence[str]) -> None:
    """Compare the JSON maps that two commands print, without holding either in memory.

    Raises:
        ValueError: The maps differ.
    """
    with (
        subprocess.Popen(qedimg, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(qemu_img, stdout=subprocess.PIPE, text=True) as second,
    ):
        assert first.stdout is not None
        assert second.stdout is not None
        for one, other in zip_longest(map_lines(first.stdout), map_lines(second.stdout)):
            if one != other:
                first.kill()
                second.kill()
                msg = f"map: found {one}, expected {other}"
                raise ValueError(msg)


def _line(outcome: Outcome, seconds: float) -> str:
    """Return the result of a task as a line."""
    parts = [f"{system} {number(median(found))} s" for system, found in outcome.seconds.items()]
    if outcome.ratio is not None:
        parts.append(f"qedimg/qemu-img {outcome.ratio:.2f}")
    parts.append(f"{max(outcome.memory.get('qedimg', [0])) / MIB:.0f} MiB")
    parts += [f"MISSED: {what}" for what in outcome.missed()]
    parts += [f"FAILED: {what}" for what in outcome.failures]
    return f"{outcome.task.name}: {'  '.join(parts)}  ({seconds:.0f} s)"


def program() -> list[str]:
    """Return the command to measure: QEDIMG, or by default that of this checkout."""
    if "QEDIMG" in os.environ:
        return shlex.split(os.environ["QEDIMG"])
    installed = Path(sys.executable).with_name("qedimg")
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-m", "qedfuse.cli.qedimg"]


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/toolbox.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", metavar="REGEX", default="", help="only tasks with such names")
    parser.add_argument("--quick", action="store_true", help="small disks, three rounds")
    parser.add_argument("--rounds", type=int, help=f"of each task ({ROUNDS})")
    parser.add_argument("--size", help=f"of a disk with data ({SIZE})")
    parser.add_argument("--large", help=f"of a full disk without data ({LARGE})")
    parser.add_argument("--dir", type=Path, default=ROOT, help="where 40 GiB are free")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    arguments = parser.parse_args()
    tasks = [task for task in TASKS if re.search(arguments.tasks, task.name)]
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    size = arguments.size or (QUICK_SIZE if arguments.quick else SIZE)
    large = arguments.large or (QUICK_LARGE if arguments.quick else LARGE)
    # An installed program has compiled byte code; here the first round must be able to store it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    outcomes = []
    directory = Path(tempfile.mkdtemp(prefix="qedfuse-toolbox-", dir=arguments.dir))
    try:
        settings = f"{rounds} rounds, disks of {size}, full disks of {large}"
        about = facts(directory, program()[0], settings)
        about["versions"] = ", ".join(
            run(*command, "--version").splitlines()[0] for command in (program(), ["qemu-img"])
        )
        bench = Bench(Files(directory, parse_size(size), parse_size(large)), program())
        for task in tasks:
            began = time.monotonic()
            outcomes.append(bench.run_task(task, rounds))
            print(_line(outcomes[-1], time.monotonic() - began), flush=True)
    except (BenchmarkError, OSError, ValueError) as error:
        sys.exit(f"toolbox.sh: {error}")
    except KeyboardInterrupt:
        sys.exit("toolbox.sh: interrupted")
    finally:
        shutil.rmtree(directory)
    table = markdown(outcomes, about)
    print("\n" + table)
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.json:
        text = json.dumps(as_json(outcomes, about), indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
