"""The results: medians, ratios and targets, as a table, JSON and a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.plot import Mark, Row, draw_rows
from benchmarks.targets import CHAIN_COST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.cells import Cell
    from benchmarks.servers import System

TITLES: Final[Mapping[System, str]] = {
    "qedfuse": "qedfuse",
    "qemu": "QEMU",
    "baseline": "baseline",
    "single": "one image",
}


@dataclass
class Outcome:
    """The result of a cell.

    Attributes:
        cell: The cell.
        figures: Each system's figures in the cell's unit, one per round.
        failures: A line for each failure.
        remarks: Further lines for the reader, such as wrong data of QEMU.
    """

    cell: Cell
    figures: dict[System, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def fail(self, system: System, what: str) -> None:
        """Record a failure; QEMU's are only remarks, which do not fail the run."""
        notes = self.remarks if system == "qemu" else self.failures
        notes.append(f"{TITLES[system]} {what}")

    def median(self, system: System) -> float | None:
        """Return the median of a system's figures, or None without figures."""
        figures = self.figures.get(system)
        return median(figures) if figures else None

    def ratio(self, other: System) -> float | None:
        """Return how many times as fast as ``other`` qedfuse is, or None without figures."""
        own_rate, other_rate = self.median("qedfuse"), self.median(other)
        if not own_rate or not other_rate:
            return None
        return other_rate / own_rate if self.cell.unit == "s" else own_rate / other_rate

    def missed(self) -> list[str]:
        """Return a phrase for each target that is missed."""
        found = []
        for what, ratio, target in (
            ("QEMU", self.ratio("qemu"), self.cell.qemu_target),
            ("the baseline", self.ratio("baseline"), self.cell.baseline_target),
        ):
            if ratio is not None and target is not None and ratio < target:
                found.append(f"{ratio:.2f} of {what}, expected {target:g}")
        cost = self.ratio("single")
        if cost is not None and 1 / cost > CHAIN_COST:
            found.append(f"{1 / cost:.2f} of the cost on one image, expected {CHAIN_COST:g}")
        return found

    def verdict(self) -> str:
        """Return the verdict on the targets in one word; empty if there are none."""
        if self.failures:
            return "failed"
        if self.cell.qemu_target is None and self.cell.baseline_target is None:
            return ""
        if self.missed():
            return "missed"
        ratios = (
            (self.cell.qemu_target, self.ratio("qemu")),
            (self.cell.baseline_target, self.ratio("baseline")),
        )
        known = all(ratio is not None for target, ratio in ratios if target is not None)
        return "met" if known else "unknown"


def number(figure: float) -> str:
    """Return a figure with three significant digits."""
    if figure >= 100:  # noqa: PLR2004  without decimals, which are not significant
        return f"{figure:,.0f}"
    return f"{figure:.3g}"


def spread(figures: Sequence[float]) -> str:
    """Return the median and, in brackets, the minimum and the maximum."""
    return f"{number(median(figures))} ({number(min(figures))} to {number(max(figures))})"


def markdown(outcomes: Iterable[Outcome], facts: Mapping[str, str]) -> str:
    """Return the table, with ``facts`` above and notes below."""
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    lines += [
        "",
        "| cell | unit | qedfuse | QEMU | baseline | to QEMU | target | to baseline | target | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for outcome in outcomes:
        cell = outcome.cell
        figures = [
            spread(outcome.figures[system]) if outcome.figures.get(system) else "-"
            for system in ("qedfuse", "qemu", "baseline")
        ]
        remarks = [*outcome.failures, *outcome.remarks, *([cell.note] if cell.note else [])]
        if single := outcome.figures.get("single"):
            remarks.append(
                f"qedfuse on one image of the same content: {spread(single)}; the chain costs "
                f"{1 / (outcome.ratio('single') or 1):.2f} times that (target {CHAIN_COST:g})"
            )
        mark = ""
        if remarks:
            notes.append("; ".join(remarks))
            mark = f" [{len(notes)}]"
        ratios = [
            *(_ratio(outcome.ratio("qemu")), _target(cell.qemu_target)),
            *(_ratio(outcome.ratio("baseline")), _target(cell.baseline_target)),
        ]
        words = [cell.title + mark, cell.unit, *figures, *ratios, outcome.verdict()]
        lines.append(f"| {' | '.join(words)} |")
    lines += ["", *(f"{index}. {note}" for index, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _target(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def as_json(outcomes: Iterable[Outcome], facts: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as JSON, with every single figure."""
    return {
        "facts": dict(facts),
        "cells": [
            {
                "name": outcome.cell.name,
                "title": outcome.cell.title,
                "unit": outcome.cell.unit,
                "figures": outcome.figures,
                "medians": {system: outcome.median(system) for system in outcome.figures},
                "ratios": {
                    system: outcome.ratio(system)
                    for system in outcome.figures
                    if system != "qedfuse"
                },
                "targets": {
                    "qemu": outcome.cell.qemu_target,
                    "baseline": outcome.cell.baseline_target,
                },
                "missed": outcome.missed(),
                "failures": outcome.failures,
                "remarks": outcome.remarks,
            }
            for outcome in outcomes
        ],
    }


def plot(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Draw the ratios and their targets."""
    rows = []
    for outcome in outcomes:
        marks = []
        for ratio, target, colour in (
            (outcome.ratio("qemu"), outcome.cell.qemu_target, "#2471a3"),
            (outcome.ratio("baseline"), outcome.cell.baseline_target, "#d68910"),
        ):
            if ratio is not None:
                marks.append(Mark(ratio, colour))
            if target is not None:
                marks.append(Mark(target, colour, target=True))
        rows.append(Row(outcome.cell.title, marks))
    legend = [("qedfuse / QEMU", "#2471a3"), ("qedfuse / baseline", "#d68910")]
    draw_rows(path, "Speed ratios; a bar is the target", legend, rows)
