"""The results: medians, ratios, targets and CPU time, as tables, JSON and a plot."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.catalogue import CHAIN_TARGET, MEAN_TARGET
from benchmarks.outcome import Work, baseline_mean_ratio, mean_ratio
from benchmarks.plot import Mark, Row, draw_rows
from benchmarks.systems import PEERS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.cputime import CpuTime
    from benchmarks.outcome import Outcome
    from benchmarks.systems import System

PEER_COLOURS: Final = ("#2471a3", "#7d3c98")
PEER_TARGET_COLOUR: Final = "#1b2631"
BASELINE_COLOUR: Final = "#d68910"
_MICROSECONDS: Final = 1e6


def number(figure: float) -> str:
    """Return a figure with three significant digits."""
    if figure >= 100:  # noqa: PLR2004  without decimals, which are not significant
        return f"{figure:,.0f}"
    return f"{figure:.3g}"


def with_range(figures: Sequence[float]) -> str:
    """Return the median and, in brackets, the minimum and the maximum."""
    return f"{number(median(figures))} ({number(min(figures))} to {number(max(figures))})"


def markdown(outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> str:
    """Return the tables of rates and of CPU time, with ``facts`` above and notes below."""
    lines = [f"- {name}: {fact}" for name, fact in facts.items()]
    rates, notes = _rates(outcomes)
    lines += ["", *rates, "", *(f"{index}. {note}" for index, note in enumerate(notes, 1))]
    lines += ["", mean_line(outcomes), "", "CPU time of the server in µs, user + system:"]
    lines += ["", *_cpu_times(outcomes)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def mean_line(outcomes: Collection[Outcome]) -> str:
    """Return a sentence about the geometric mean of the ratios to the fastest peer."""
    mean = mean_ratio(outcomes)
    if mean is None:
        return "No cell has a ratio to QEMU."
    verdict = "met" if mean >= MEAN_TARGET else "missed"
    line = (
        f"The geometric mean of the ratios to the faster QEMU is {mean:.2f} "
        f"(target {MEAN_TARGET:g}: {verdict})."
    )
    baseline = baseline_mean_ratio(outcomes)
    if baseline is not None:
        line += f"  That of the baseline, a flat file without an image format, is {baseline:.2f}."
    return line


def measured_systems(outcomes: Iterable[Outcome]) -> dict[System, str]:
    """Return the systems that have a column, with their titles."""
    found: dict[System, str] = {}
    outcomes = list(outcomes)
    for system in ("qedfuse", *PEERS, "baseline"):
        for outcome in outcomes:
            if system in outcome.figures:
                found[system] = outcome.titles[system]
    return found


def _rates(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Return the table of the rates, and the notes below it."""
    systems = measured_systems(outcomes)
    heads = ["cell", "unit", *systems.values(), "to QEMU", "target", "to baseline", "target"]
    lines = _table_head([*heads, "rounds (spread)", ""])
    notes: list[str] = []
    for outcome in outcomes:
        cell = outcome.cell
        figures = [
            with_range(outcome.figures[system]) if outcome.figures.get(system) else "-"
            for system in systems
        ]
        remarks = [*outcome.failures, *outcome.remarks, *([cell.note] if cell.note else [])]
        if single := outcome.figures.get("single"):
            remarks.append(
                f"qedfuse on one image of the same content: {with_range(single)}; the chain "
                f"reaches {_ratio(outcome.ratio('single'))} of that (target {CHAIN_TARGET:g})"
            )
        mark = ""
        if remarks:
            note = "; ".join(remarks)
            if note not in notes:
                notes.append(note)
            mark = f" [{notes.index(note) + 1}]"
        ratios = [
            *(_peer_ratio(outcome), f"{cell.peer_target:g}"),
            *(_ratio(outcome.ratio("baseline")), _target(cell.baseline_target)),
        ]
        rounds = f"{outcome.rounds} ({outcome.spread:.0%})"
        lines.append(
            _row([cell.title + mark, cell.unit, *figures, *ratios, rounds, outcome.verdict()])
        )
    return lines, notes


def _cpu_times(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table of the CPU times per request and per MiB."""
    systems = measured_systems(outcomes)
    lines = _table_head(
        [
            "cell",
            *(f"{title}, per request" for title in systems.values()),
            *(f"{title}, per MiB" for title in systems.values()),
        ]
    )
    for outcome in outcomes:
        work = [outcome.work.get(system, Work()) for system in systems]
        lines.append(
            _row(
                [
                    outcome.cell.title,
                    *(_sum(done.per_request()) for done in work),
                    *(_sum(done.per_mib()) for done in work),
                ]
            )
        )
    return lines


def _table_head(heads: Sequence[str]) -> list[str]:
    return [_row(heads), _row(["---"] * len(heads))]


def _row(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def _sum(time: CpuTime | None) -> str:
    """Return user and system time in microseconds."""
    if time is None:
        return "-"
    return f"{number(time.user * _MICROSECONDS)} + {number(time.system * _MICROSECONDS)}"


def _peer_ratio(outcome: Outcome) -> str:
    """Return the ratio to the fastest peer, which is named if several were measured."""
    several = sum(peer in outcome.figures for peer in PEERS) > 1
    name = f" ({outcome.titles[outcome.peer]})" if several and outcome.peer else ""
    return _ratio(outcome.peer_ratio) + name


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _target(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def as_json(outcomes: Sequence[Outcome], facts: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as JSON, with every single figure."""
    return {
        "facts": dict(facts),
        "mean_ratio": mean_ratio(outcomes),
        "mean_target": MEAN_TARGET,
        "cells": [
            {
                "name": outcome.cell.name,
                "title": outcome.cell.title,
                "unit": outcome.cell.unit,
                "titles": {system: outcome.titles[system] for system in outcome.figures},
                "figures": outcome.figures,
                "medians": {system: outcome.median(system) for system in outcome.figures},
                "ratios": {
                    system: outcome.ratio(system)
                    for system in outcome.figures
                    if system != "qedfuse"
                },
                "fastest_peer": outcome.peer,
                "targets": {
                    "peer": outcome.cell.peer_target,
                    "baseline": outcome.cell.baseline_target,
                },
                "rounds": outcome.rounds,
                "spread": outcome.spread,
                "cpu_seconds": {
                    system: {
                        "user": work.time.user,
                        "system": work.time.system,
                        "requests": work.requests,
                        "bytes": work.moved,
                    }
                    for system, work in outcome.work.items()
                },
                "missed": outcome.missed(),
                "failures": outcome.failures,
                "remarks": outcome.remarks,
                "details": outcome.details,
            }
            for outcome in outcomes
        ],
    }


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the ratios to each peer and to the baseline, and the targets."""
    systems = measured_systems(outcomes)
    colours = {**dict(zip(PEERS, PEER_COLOURS, strict=True)), "baseline": BASELINE_COLOUR}
    rows = []
    for outcome in outcomes:
        marks = [
            Mark(ratio, colour)
            for system, colour in colours.items()
            if (ratio := outcome.ratio(system)) is not None
        ]
        marks.append(Mark(outcome.cell.peer_target, PEER_TARGET_COLOUR, target=True))
        if outcome.cell.baseline_target is not None:
            marks.append(Mark(outcome.cell.baseline_target, BASELINE_COLOUR, target=True))
        rows.append(Row(outcome.cell.title, marks))
    legend = [
        (f"qedfuse / {systems[system]}", colour)
        for system, colour in colours.items()
        if system in systems
    ]
    title = "Speed ratios; a bar is the target, a dark one that for the faster QEMU"
    draw_rows(path, title, legend, rows)
