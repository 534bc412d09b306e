"""The tasks of the toolbox's benchmarks, and their results as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.report import number, with_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MIB: Final = 1 << 20
MAX_MEMORY_BYTES: Final = 256 * MIB
"""The limit on the peak memory of qedimg."""
COLUMNS: Final = (
    *("task", "qedimg, s", "qemu-img, s", "ratio", "target"),
    "peak MiB",
)


class Task(NamedTuple):
    """A job for both programs.

    In the arguments, ``{source}`` and ``{target}`` are paths; a target does not exist before.

    Attributes:
        name: Its name on the command line.
        title: Its title in the table.
        qedimg: The arguments of qedimg.
        qemu_img: The arguments of qemu-img; empty if it has no such command.
        source: The file that is read, if any.
        target: The extension of the file that is created, if any.
        expected: The flat file with the expected content of the target.
        ratio: The speed that qedimg should reach, in multiples of that of qemu-img.
        seconds: How long qedimg may take.
        cold: Whether the source is evicted from the host's page cache each time.
        qemu_img_code: An exit code of qemu-img that is not a failure, besides 0.
    """

    name: str
    title: str
    qedimg: str
    qemu_img: str = ""
    source: str = ""
    target: str = ""
    expected: str = ""
    ratio: float | None = None
    seconds: float | None = None
    qemu_img_code: int = 0
    cold: bool = False


def _convert(name: str, title: str, source: str, target: str, cache: str = "writeback") -> Task:
    """Return a task that copies a disk."""
    form, goal = ("raw" if end.endswith("raw") else "qed" for end in (source, target))
    words = f"convert -t {cache} -f {form} -O {goal} {{source}} {{target}}"
    return Task(
        *(name, title, words, words),
        source=source,
        target=target,
        expected=f"{Path(source).stem}.raw",
        ratio=1.2,
    )


LEAKS_CODE: Final = 3
MISCOUNTED_BYTES: Final = 4 << 30
"""In files of this length and more QEMU counts too many clusters, and reports them as leaked."""

TASKS: Final = (
    Task("check", "check, full disk", "check {source}", "check -f qed {source}",
         source="full.qed", ratio=1.0, qemu_img_code=LEAKS_CODE),
    Task("check-scattered", "check, full disk, no cluster beside its neighbour",
         "check {source}", "check -f qed {source}", source="scattered.qed", ratio=1.0,
         qemu_img_code=LEAKS_CODE),
    Task("check-cold", "check, full disk, its tables not in the host's page cache",
         "check {source}", "check -f qed {source}", source="full.qed", ratio=1.0,
         qemu_img_code=LEAKS_CODE, cold=True),
    Task("map", "map, full disk", "map {source}", "map -f qed {source}",
         source="full.qed", ratio=1.0),
    Task("map-json", "map --output json, full disk", "map --output json {source}",
         "map -f qed --output json {source}", source="full.qed", ratio=1.0),
    Task("map-scattered", "map, full disk, no cluster beside its neighbour",
         "map {source}", "map -f qed {source}", source="scattered.qed", ratio=1.0),
    _convert("convert-raw-qed", "convert raw to QED", "mixed.raw", "qed"),
    _convert("convert-qed-raw", "convert QED to raw", "mixed.qed", "raw"),
    _convert("convert-chain", "convert a chain of 4 to one QED", "chain.qed", "qed"),
    _convert("convert-raw-qed-unsafe", "convert raw to QED, not flushed", "mixed.raw", "qed",
             "unsafe"),
    _convert("convert-qed-raw-unsafe", "convert QED to raw, not flushed", "mixed.qed", "raw",
             "unsafe"),
    _convert("convert-chain-unsafe", "convert a chain of 4 to one QED, not flushed",
             "chain.qed", "qed", "unsafe"),
    Task("info", "info, whole process", "info {source}", "info -f qed {source}",
         source="mixed.qed", seconds=0.3),
    Task("info-full", "info of the full disk, whole process", "info {source}",
         "info -f qed {source}", source="full.qed", seconds=0.3),
    Task("create", "create a disk of 64 TiB, whole process", "create {target} 64T",
         "create -f qed {target} 64T", target="qed", seconds=0.3),
    Task("measure", "measure raw for QED", "measure {source}", source="mixed.raw"),
    Task("compare", "compare raw and QED", "compare {source} {directory}/mixed.raw",
         "compare {source} {directory}/mixed.raw", source="mixed.qed"),
)  # fmt: skip
"""The tasks, with their targets."""


@dataclass
class Outcome:
    """The result of a task: seconds and bytes of memory of each round, by program."""

    task: Task
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """The speed of qedimg in multiples of that of qemu-img; None without figures."""
        qedimg, qemu_img = self.seconds.get("qedimg"), self.seconds.get("qemu-img")
        return median(qemu_img) / median(qedimg) if qedimg and qemu_img else None

    def missed(self) -> list[str]:
        """Return a phrase for each target that is missed."""
        found = []
        ratio, qedimg = self.ratio, self.seconds.get("qedimg")
        if self.task.ratio is not None and ratio is not None and ratio < self.task.ratio:
            found.append(f"{ratio:.2f} of qemu-img, expected {self.task.ratio:g}")
        if self.task.seconds is not None and qedimg and median(qedimg) > self.task.seconds:
            found.append(f"{median(qedimg):.2f} s, expected {self.task.seconds:g}")
        peak = max(self.memory.get("qedimg", [0]))
        if peak >= MAX_MEMORY_BYTES:
            found.append(f"{peak / MIB:.0f} MiB, expected less than {MAX_MEMORY_BYTES / MIB:.0f}")
        return found

    def verdict(self) -> str:
        """Return the verdict on the targets in one word."""
        if self.failures:
            return "failed"
        return "missed" if self.missed() else "met"


def markdown(outcomes: Iterable[Outcome], about: Mapping[str, str]) -> str:
    """Return the table, with ``about`` above and notes below."""
    lines = [f"- {name}: {fact}" for name, fact in about.items()]
    lines += [
        "",
        f"| {' | '.join(COLUMNS)} | |",
        f"|{' --- |' * (len(COLUMNS) + 1)}",
    ]
    notes = []
    for outcome in outcomes:
        task = outcome.task
        shown = [
            with_range(outcome.seconds[system]) if outcome.seconds.get(system) else ""
            for system in ("qedimg", "qemu-img")
        ]
        ratio = f"{outcome.ratio:.2f}" if outcome.ratio is not None else ""
        target = f"{task.ratio:g}" if task.ratio is not None else ""
        if task.seconds is not None:
            target = f"{task.seconds:g} s"
        memory = number(max(outcome.memory.get("qedimg", [0])) / MIB)
        row = [task.title, *shown, ratio, target, memory]
        lines.append(f"| {' | '.join([*row, outcome.verdict()])} |")
        notes += [f"- {task.name}: {what}" for what in (*outcome.failures, *outcome.missed())]
    lines += ["", "The arguments of qemu-img, and those of qedimg accordingly:", ""]
    lines += [f"- {outcome.task.name}: `qemu-img {outcome.task.qemu_img}`" for outcome in outcomes
              if outcome.task.qemu_img]  # fmt: skip
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def as_json(outcomes: Iterable[Outcome], about: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as JSON, with every single figure."""
    return {
        "facts": dict(about),
        "tasks": [
            {
                **outcome.task._asdict(),
                "seconds": outcome.seconds,
                "memory": outcome.memory,
                "ratio": outcome.ratio,
                "missed": outcome.missed(),
                "failures": outcome.failures,
            }
            for outcome in outcomes
        ],
    }
