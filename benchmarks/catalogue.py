"""All cells, and the targets that concern more than one rate of a cell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from benchmarks.diskcells import RANDOM_CELLS, SEQUENTIAL_CELLS, SEVERAL_DISKS_CELLS
from benchmarks.loopcells import LOOP_CELLS

if TYPE_CHECKING:
    from benchmarks.cells import Cell

CELLS: Final = (*RANDOM_CELLS, *SEQUENTIAL_CELLS, *SEVERAL_DISKS_CELLS, *LOOP_CELLS)

CHAIN_TARGET: Final = 0.9
"""The rate of reads through a chain should be at least this part of the rate on one image."""
MEAN_TARGET: Final = 2.5
"""The target for the geometric mean of all ratios to the faster QEMU."""


def select_cells(pattern: str | None) -> list[Cell]:
    """Return the cells whose names match a regular expression; all cells for None.

    Raises:
        ValueError: The text is not a regular expression, or matches no name.
    """
    try:
        found = [cell for cell in CELLS if re.search(pattern or "", cell.name)]
    except re.error as error:
        msg = f"--cells: found {pattern!r}, expected a regular expression: {error}"
        raise ValueError(msg) from None
    if not found:
        msg = f"--cells: found no cell for {pattern!r}, expected one of those that --list shows"
        raise ValueError(msg)
    return found
