"""Line charts and dot plots as SVG files, without a library."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log2
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDTH: Final = 760
HEIGHT: Final = 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 40, 48
TICKS: Final = 6
MAX_POINTS: Final = 400


class Line(NamedTuple):
    """A curve: its name, its points, and its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def draw(path: Path, title: str, axes: tuple[str, str], lines: Sequence[Line]) -> None:
    """Write curves to a file; ``axes`` are the names of the x and the y axis."""
    max_x = max(x for line in lines for x, _ in line.points) or 1
    max_y = 1.1 * max(y for line in lines for _, y in line.points) or 1

    def to_pixels(x: float, y: float) -> str:
        right = LEFT + x / max_x * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - y / max_y * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f},{down:.1f}"

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(TICKS + 1):
        x, y = to_pixels(max_x * tick / TICKS, max_y * tick / TICKS).split(",")
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#dddddd"/>',
            (
                f'<text x="{LEFT - 6}" y="{float(y) + 4}" text-anchor="end">'
                f"{max_y * tick / TICKS:.0f}</text>"
            ),
            (
                f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{max_x * tick / TICKS:.0f}</text>"
            ),
        ]
    parts += [
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(axes[0])}</text>',
        (
            f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" '
            f'transform="rotate(-90 14 {HEIGHT / 2})">{escape(axes[1])}</text>'
        ),
    ]
    for number, line in enumerate(lines):
        step = max(1, len(line.points) // MAX_POINTS)
        points = [*line.points[::step], line.points[-1]]
        where = " ".join(to_pixels(x, y) for x, y in points)
        down = TOP + 14 + 16 * number
        parts += [
            f'<polyline points="{where}" fill="none" stroke="{line.colour}" stroke-width="1.8"/>',
            (
                f'<line x1="{LEFT + 12}" x2="{LEFT + 36}" y1="{down - 4}" y2="{down - 4}" '
                f'stroke="{line.colour}" stroke-width="3"/>'
            ),
            f'<text x="{LEFT + 42}" y="{down}">{escape(line.name)}</text>',
        ]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


class Mark(NamedTuple):
    """A value on a row: a dot, or a vertical bar for a target."""

    value: float
    colour: str
    target: bool = False


class Row(NamedTuple):
    """A line of a dot plot."""

    name: str
    marks: Sequence[Mark]


ROW_LEFT: Final = 520
ROW_HEIGHT: Final = 22
ROW_WIDTH: Final = 1080


def draw_rows(
    path: Path, title: str, legend: Sequence[tuple[str, str]], rows: Sequence[Row]
) -> None:
    """Write a dot plot with a logarithmic axis to a file; ``legend`` names the colours."""
    values = [mark.value for row in rows for mark in row.marks if mark.value > 0]
    low = floor(log2(min([*values, 0.5])))
    high = ceil(log2(max([*values, 2.0])))
    height = TOP + 24 + ROW_HEIGHT * len(rows) + BOTTOM

    def across(value: float) -> float:
        part = (log2(max(value, 2.0**low)) - low) / (high - low)
        return ROW_LEFT + part * (ROW_WIDTH - ROW_LEFT - RIGHT)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ROW_WIDTH} {height}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{ROW_WIDTH}" height="{height}" fill="white"/>',
        (
            f'<text x="{ROW_WIDTH / 2}" y="20" text-anchor="middle" font-size="14">'
            f"{escape(title)}</text>"
        ),
    ]
    for power in range(low, high + 1):
        x = across(2.0**power)
        parts += [
            (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 20}" y2="{height - BOTTOM}" '
                f'stroke="{"#888888" if power == 0 else "#dddddd"}"/>'
            ),
            (
                f'<text x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">'
                f"{2.0**power:g}</text>"
            ),
        ]
    for number, (name, colour) in enumerate(legend):
        x = ROW_LEFT + 160 * number
        parts += [
            f'<circle cx="{x}" cy="{TOP + 4}" r="5" fill="{colour}"/>',
            f'<text x="{x + 10}" y="{TOP + 8}">{escape(name)}</text>',
        ]
    for number, row in enumerate(rows):
        y = TOP + 34 + ROW_HEIGHT * number
        parts.append(
            f'<text x="{ROW_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>'
        )
        for mark in row.marks:
            x = across(mark.value)
            if mark.target:
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{y + 8}" '
                    f'stroke="{mark.colour}" stroke-width="2"/>'
                )
            else:
                parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{mark.colour}"/>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
