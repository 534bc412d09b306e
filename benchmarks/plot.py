"""Curves as an SVG file, without a library: a few lines, two axes, a legend."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDTH: Final = 760
HEIGHT: Final = 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 40, 48
TICKS: Final = 6
MOST_POINTS: Final = 400


class Line(NamedTuple):
    """A curve: its name, its points, and its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def draw(path: Path, title: str, axes: tuple[str, str], lines: Sequence[Line]) -> None:
    """Write the curves to a file; ``axes`` names what runs along x and y."""
    most_x = max(x for line in lines for x, _ in line.points) or 1
    most_y = 1.1 * max(y for line in lines for _, y in line.points) or 1

    def place(x: float, y: float) -> str:
        right = LEFT + x / most_x * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - y / most_y * (HEIGHT - TOP - BOTTOM)
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
        x, y = place(most_x * tick / TICKS, most_y * tick / TICKS).split(",")
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#dddddd"/>',
            (
                f'<text x="{LEFT - 6}" y="{float(y) + 4}" text-anchor="end">'
                f"{most_y * tick / TICKS:.0f}</text>"
            ),
            (
                f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{most_x * tick / TICKS:.0f}</text>"
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
        step = max(1, len(line.points) // MOST_POINTS)
        points = [*line.points[::step], line.points[-1]]
        where = " ".join(place(x, y) for x, y in points)
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
