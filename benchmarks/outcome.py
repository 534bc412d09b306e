"""The result of a cell: figures, CPU time, ratios, and the verdict on its targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, NamedTuple, Self

from benchmarks.catalogue import CHAIN_TARGET
from benchmarks.cells import MIB
from benchmarks.cputime import CpuTime
from benchmarks.rounds import spread
from benchmarks.systems import PEERS, TITLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benchmarks.cells import Cell
    from benchmarks.loads import Result
    from benchmarks.systems import System


class Work(NamedTuple):
    """What a server has done: CPU time, requests of the load, and bytes that it moved."""

    time: CpuTime = CpuTime()
    requests: int = 0
    moved: int = 0

    def plus(self, time: CpuTime, result: Result) -> Self:
        """Return the sum with a measurement."""
        return type(self)(
            self.time.plus(time), self.requests + result.requests, self.moved + result.moved
        )

    def per_request(self) -> CpuTime | None:
        """Return the CPU time per request; None if their number is unknown."""
        return self._divided(self.requests)

    def per_mib(self) -> CpuTime | None:
        """Return the CPU time per MiB; None if the load moves no bytes."""
        return self._divided(self.moved / MIB)

    def _divided(self, count: float) -> CpuTime | None:
        return CpuTime(self.time.user / count, self.time.system / count) if count else None


@dataclass
class Outcome:
    """The result of a cell.

    Attributes:
        cell: The cell.
        figures: Each system's figures in the cell's unit, one per round.
        failures: A line for each failure.
        remarks: Further lines for the reader, such as wrong data of a peer.
        details: Details for the remarks about peers, such as offsets and paths.
        work: What each system's server has done in all rounds.
        titles: The names of the systems.
    """

    cell: Cell
    figures: dict[System, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    work: dict[System, Work] = field(default_factory=dict)
    titles: Mapping[System, str] = field(default_factory=lambda: TITLES)

    def add(self, system: System, result: Result, time: CpuTime) -> None:
        """Record a measurement and the CPU time that the server used for it."""
        self.figures.setdefault(system, []).append(result.figure)
        self.work[system] = self.work.get(system, Work()).plus(time, result)

    def fail(self, system: System, what: str, detail: str) -> None:
        """Record a failure; the failure of a peer is only a remark, and does not fail the run."""
        title = self.titles[system]
        if system not in PEERS:
            self.failures.append(f"{title} {what}: {detail}")
            return
        if f"{title} {what}" not in self.remarks:
            self.remarks.append(f"{title} {what}")
        self.details.append(f"{title}: {detail}")

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return max(map(len, self.figures.values()), default=0)

    @property
    def spread(self) -> float:
        """The largest spread of a system's figures."""
        return max(map(spread, self.figures.values()), default=0.0)

    def median(self, system: System) -> float | None:
        """Return the median of a system's figures; None without figures."""
        figures = self.figures.get(system)
        return median(figures) if figures else None

    def ratio(self, other: System) -> float | None:
        """Return the rate of qedfuse divided by that of ``other``; None without figures."""
        own_rate, other_rate = self.median("qedfuse"), self.median(other)
        if not own_rate or not other_rate:
            return None
        return other_rate / own_rate if self.cell.unit == "s" else own_rate / other_rate

    @property
    def peer(self) -> System | None:
        """The fastest of the peers that were measured; None if none was."""
        medians = {peer: rate for peer in PEERS if (rate := self.median(peer))}
        if not medians:
            return None
        fastest = min if self.cell.unit == "s" else max
        return fastest(medians, key=lambda peer: medians[peer])

    @property
    def peer_ratio(self) -> float | None:
        """The rate of qedfuse divided by that of the fastest peer; None without figures."""
        return self.ratio(self.peer) if self.peer else None

    def missed(self) -> list[str]:
        """Return a phrase for each target that is missed."""
        peer = self.titles[self.peer] if self.peer else ""
        return [
            f"{ratio:.2f} of {what}, expected {target:g}"
            for what, ratio, target in self._targets(peer)
            if ratio is not None and ratio < target
        ]

    def verdict(self) -> str:
        """Return the verdict on the targets in one word."""
        if self.failures:
            return "failed"
        if self.missed():
            return "missed"
        known = all(ratio is not None for _, ratio, _ in self._targets(""))
        return "met" if known else "unknown"

    def _targets(self, peer: str) -> list[tuple[str, float | None, float]]:
        """Return the system, the ratio and the target of each target; ``peer`` is a name."""
        found = [(peer, self.peer_ratio, self.cell.peer_target)]
        if self.cell.baseline_target is not None:
            found.append(("the baseline", self.ratio("baseline"), self.cell.baseline_target))
        if self.cell.stage == "chain":
            found.append(("the rate on one image", self.ratio("single"), CHAIN_TARGET))
        return found


def mean_ratio(outcomes: Iterable[Outcome]) -> float | None:
    """Return the geometric mean of the ratios to the fastest peer; None without any."""
    ratios = [ratio for outcome in outcomes if (ratio := outcome.peer_ratio)]
    return geometric_mean(ratios) if ratios else None


def baseline_mean_ratio(outcomes: Iterable[Outcome]) -> float | None:
    """Return the geometric mean of the baseline's ratios to the fastest peer; None without any."""
    ratios = [
        peer / baseline
        for outcome in outcomes
        if (peer := outcome.peer_ratio) and (baseline := outcome.ratio("baseline"))
    ]
    return geometric_mean(ratios) if ratios else None
