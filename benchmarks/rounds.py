"""The rounds of a cell: their order, their number, and the spread of their figures."""

from __future__ import annotations

from statistics import median, quantiles
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_SPREAD: Final = 0.15
"""A cell is measured again while the spread of a system's figures is not below this."""

T = TypeVar("T")


class RoundLimits(NamedTuple):
    """The least and the largest number of rounds of a cell."""

    least: int
    most: int

    def is_enough(self, count: int, figures: Iterable[Sequence[float]]) -> bool:
        """Return whether ``count`` rounds suffice; ``figures`` are those of each system."""
        if count < self.least:
            return False
        return count >= self.most or max(map(spread, figures), default=0.0) < MAX_SPREAD


def spread(figures: Sequence[float]) -> float:
    """Return the distance between the quartiles as a part of the median; 0 for one figure.

    With more rounds this distance becomes more certain; that between the extremes would only grow.
    """
    if len(figures) < 2 or not median(figures):  # noqa: PLR2004  quartiles need two figures
        return 0.0
    low, middle, high = quantiles(figures, n=4, method="inclusive")
    return (high - low) / middle


def rotated_orders(systems: Sequence[T], rounds: int) -> list[list[T]]:
    """Return an order for each round; the first of a round is the last of the next one."""
    orders = []
    for number in range(rounds):
        first = number % len(systems)
        orders.append([*systems[first:], *systems[:first]])
    return orders
