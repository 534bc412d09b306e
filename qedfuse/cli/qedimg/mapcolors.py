"""The colours of the pictures of ``qedimg map``: one for each cell of the file and of the disk.

Data has the colour of its position on the disk, from blue for the beginning to red for the end.  So
a fragmented file shows a mixture of colours.
"""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from qedfuse.tools.inspection.layout import Layout

Color = tuple[int, int, int]
"""Red, green and blue, each from 0 to 255."""

TABLES: Final[Color] = (255, 255, 255)
ZEROS: Final[Color] = (120, 120, 120)
BASE: Final[Color] = (75, 60, 35)
EMPTY: Final[Color] = (35, 35, 35)
_FIRST_HUE: Final = 2 / 3
"""The hue of the beginning of the disk: blue.  The hue of the end is 0: red."""


class Cell(NamedTuple):
    """A cell of a picture; it stands for some adjacent clusters.

    Attributes:
        color: The colour of the cell.
        character: The character that shows the cell in a picture without colours.
    """

    color: Color
    character: str


def data_color(position: float) -> Color:
    """Return the colour of data at a position on the disk, from 0 (beginning) to 1 (end)."""
    red, green, blue = colorsys.hsv_to_rgb(_FIRST_HUE * (1 - position), 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def file_cells(layout: Layout) -> list[Cell]:
    """Return the cells of the file.

    A cell shows tables or data, whichever has more clusters, and is empty if it has neither.
    """
    totals = layout.cell_clusters(len(layout.data), of_file=True).tolist()
    found = []
    parts = zip(
        totals, layout.tables.tolist(), layout.data.tolist(), layout.positions.tolist(), strict=True
    )
    for total, tables, data, position in parts:
        if tables and tables >= data:
            found.append(Cell(_mixed(TABLES, tables / total), "T"))
        elif data:
            share = data / total
            color = _mixed(data_color(position), share)
            found.append(Cell(color, "#" if share > 0.5 else "+"))  # noqa: PLR2004  a half
        else:
            found.append(Cell(EMPTY, "."))
    return found


def disk_cells(layout: Layout) -> list[Cell]:
    """Return the cells of the disk.

    A cell shows data or zeros, whichever has more clusters; if it has neither, it shows the base,
    or a hole if the image has no base.
    """
    cells = len(layout.disk_data)
    totals = layout.cell_clusters(cells, of_file=False).tolist()
    rest = Cell(BASE, "b") if layout.has_base else Cell(EMPTY, ".")
    found = []
    positions = np.linspace(0, 1, cells).tolist()
    parts = zip(
        totals, layout.disk_data.tolist(), layout.disk_zeros.tolist(), positions, strict=True
    )
    for total, data, zeros, position in parts:
        if data and data >= zeros:
            share = data / total
            character = "#" if share > 0.5 else "+"  # noqa: PLR2004  a half
            found.append(Cell(_mixed(data_color(position), share, rest.color), character))
        elif zeros:
            found.append(Cell(_mixed(ZEROS, zeros / total, rest.color), "0"))
        else:
            found.append(rest)
    return found


def _mixed(color: Color, share: float, other: Color = EMPTY) -> Color:
    """Return a mixture of two colours, in which even a small share of ``color`` is visible."""
    weight = 0.35 + 0.65 * min(1.0, share)
    red, green, blue = (
        round(one * weight + two * (1 - weight)) for one, two in zip(color, other, strict=True)
    )
    return red, green, blue
