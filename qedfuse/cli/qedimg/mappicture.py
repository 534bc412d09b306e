"""``qedimg map --output picture`` and ``svg``: pictures of a disk and of its image file."""

from __future__ import annotations

import os
import shutil
from itertools import groupby
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from qedfuse.cli.qedimg.mapcolors import BASE, EMPTY, TABLES, ZEROS, disk_cells, file_cells
from qedfuse.cli.qedimg.mapcolors import data_color as _data_color
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.cli.qedimg.mapcolors import Cell, Color
    from qedfuse.tools.inspection.layout import Layout

ROWS: Final = 12
"""Maximum number of rows of each part of a picture for a terminal."""
_DEFAULT_COLUMNS: Final = 80
SVG_COLUMNS: Final = 128
SVG_ROWS: Final = 32
_CELL_PIXELS: Final = 7
_LINE_PIXELS: Final = 22


def terminal_columns() -> int:
    """Return how many cells fit into a line of the terminal; at least 20."""
    return max(20, shutil.get_terminal_size((_DEFAULT_COLUMNS, 24)).columns)


def picture(layout: Layout, columns: int, *, colored: bool) -> str:
    """Return a picture for a terminal; without colours, characters distinguish the cells."""
    parts = []
    for title, cells in _parts(layout):
        parts.append(f"{title}\n")
        parts += [
            _row(cells[at : at + columns], colored=colored) + "\n"
            for at in range(0, len(cells), columns)
        ]
    return "".join(parts) + _legend(layout, colored=colored) + "\n"


def uses_colors(*, is_terminal: bool) -> bool:
    """Return whether to use colours: on a terminal, unless NO_COLOR or TERM=dumb is set."""
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def summary(layout: Layout) -> str:
    """Return one line about the fragmentation, free clusters and bad entries of an image."""
    data = layout.data_clusters
    mean = format_size(data * layout.cluster_size // layout.runs) if layout.runs else "0 B"
    text = f"{data} clusters of data in {layout.runs} runs, on average {mean}"
    free = layout.free_clusters
    text += f"; {free} free ({format_size(free * layout.cluster_size)})"
    return text + (f"; {layout.bad} bad entries" if layout.bad else "")


def _parts(layout: Layout) -> Iterator[tuple[str, list[Cell]]]:
    """Yield the title and the cells of both parts of a picture: the disk, then the file."""
    yield f"disk, {format_size(layout.disk_bytes)}:", disk_cells(layout)
    yield f"file, {format_size(layout.file_bytes)}: {summary(layout)}", file_cells(layout)


def _row(cells: Sequence[Cell], *, colored: bool) -> str:
    """Return one line of a picture for a terminal."""
    if not colored:
        return "".join(cell.character for cell in cells)
    return (
        "".join(
            f"{_background(color)}{' ' * len(list(run))}"
            for color, run in groupby(cells, key=lambda cell: cell.color)
        )
        + "\033[0m"
    )


def _background(color: Color) -> str:
    """Return the escape sequence (ECMA-48) for the background colour of the next characters."""
    return "\033[48;2;{};{};{}m".format(*color)


def _legend(layout: Layout, *, colored: bool) -> str:
    """Return the line that explains the colours or characters."""
    rest: tuple[str, str, Color] = (
        ("b", "from the base", BASE) if layout.has_base else (".", "hole", EMPTY)
    )
    items: list[tuple[str, str, Color]] = [
        ("#", "data", _data_color(0.0)), ("+", "some data", _data_color(0.5)),
        ("0", "zeros", ZEROS), rest, ("T", "tables", TABLES), (".", "free", EMPTY),
    ]  # fmt: skip
    if not colored:
        return "  ".join(f"{character} {name}" for character, name, _ in items)
    gradient = "".join(f"{_background(_data_color(at / 11))} " for at in range(12)) + "\033[0m"
    others = [f"{_background(color)} \033[0m {name}" for _, name, color in items[2:]]
    return "  ".join([f"{gradient} data, by its position on the disk", *others])


def svg(layout: Layout, title: str) -> str:
    """Return the picture as an SVG document (SVG 1.1) with the title ``title``."""
    y = _LINE_PIXELS
    body = [_text(y - 6, title, bold=True)]
    for heading, cells in _parts(layout):
        y += _LINE_PIXELS
        body.append(_text(y - 6, heading))
        body.append(_grid(cells, y))
        y += -(-len(cells) // SVG_COLUMNS) * _CELL_PIXELS
    y += _LINE_PIXELS
    x = 0
    for name, color in _svg_legend(layout):
        body.append(_rectangle(x, y - 16, 14, 12, color))
        body.append(_text(y - 6, name, x=x + 18))
        x += 18 + 8 * len(name) + 16
    width = max(SVG_COLUMNS * _CELL_PIXELS, x)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 4}" '
        f'font-family="sans-serif" font-size="13">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="100%" height="100%" fill="#fff"/>\n'
    )
    return head + "\n".join(body) + "\n</svg>\n"


def _svg_legend(layout: Layout) -> Iterator[tuple[str, Color]]:
    """Yield the name and the colour of each item of the legend."""
    yield "beginning of the disk", _data_color(0.0)
    yield "middle", _data_color(0.5)
    yield "end", _data_color(1.0)
    yield "zeros", ZEROS
    yield ("from the base", BASE) if layout.has_base else ("hole", EMPTY)
    yield "tables", TABLES
    yield "free", EMPTY


def _grid(cells: Sequence[Cell], y: int) -> str:
    """Return one part of the picture as an SVG group: one path for each colour."""
    lines: dict[str, list[str]] = {}
    for row in range(0, len(cells), SVG_COLUMNS):
        x = 0
        for color, run in groupby(
            cells[row : row + SVG_COLUMNS], key=lambda cell: _hex_color(cell.color)
        ):
            width = len(list(run))
            lines.setdefault(color, []).append(f"M{x} {row // SVG_COLUMNS}h{width}")
            x += width
    # SVG centres a stroke on its coordinate, so the grid is moved by half a cell.
    move = f"translate(0 {y}) scale({_CELL_PIXELS}) translate(0 .5)"
    paths = [f'<path stroke="{color}" d="{"".join(parts)}"/>' for color, parts in lines.items()]
    return "\n".join([f'<g transform="{move}" shape-rendering="crispEdges">', *paths, "</g>"])


def _hex_color(color: Color) -> str:
    """Return a colour as ``#RGB``, which keeps the document short."""
    red, green, blue = (round(part / 17) for part in color)
    return f"#{red:x}{green:x}{blue:x}"


def _rectangle(x: int, y: int, width: int, height: int, color: Color) -> str:
    outline = ' stroke="#999"' if color == TABLES else ""
    size = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {size} fill="{_hex_color(color)}"{outline}/>'


def _text(y: int, text: str, *, x: int = 0, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}"{weight}>{escape(text)}</text>'
