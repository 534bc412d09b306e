"""A cache that keeps what was used last, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

K = TypeVar("K", bound="Hashable")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class LRUStatistics:
    """What a cache holds and has seen."""

    items: int
    weight: int
    evictions: int


class LRU(Generic[K, V]):
    """Values by key; the least recently used go first when the budget is exceeded.

    A value that ``pinned`` says must stay is passed over, so the cache can exceed its
    budget while many are pinned; it shrinks again at the next `put`.
    """

    def __init__(self, budget: int, weigh: Callable[[V], int], pinned: Callable[[V], bool]) -> None:
        """Make an empty cache; ``budget`` and what ``weigh`` returns are in bytes."""
        self._budget = budget
        self._weigh = weigh
        self._pinned = pinned
        self._items: OrderedDict[K, V] = OrderedDict()
        self._weight = 0
        self._evictions = 0

    def get(self, key: K) -> V | None:
        """Look a value up and mark it as just used."""
        value = self._items.get(key)
        if value is None:
            return None
        self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value, in place of the key's old one if there is one, then make room."""
        old = self._items.pop(key, None)
        if old is not None:
            self._weight -= self._weigh(old)
        self._items[key] = value
        self._weight += self._weigh(value)
        if self._weight > self._budget:
            self._shrink(key)

    def drop(self, key: K) -> None:
        """Forget a value, if it is there."""
        old = self._items.pop(key, None)
        if old is not None:
            self._weight -= self._weigh(old)

    def _shrink(self, newest: K) -> None:
        """Drop old values until the budget holds or only pinned ones are left."""
        dropped = []
        for key, value in self._items.items():
            if self._weight <= self._budget:
                break
            if key != newest and not self._pinned(value):
                dropped.append(key)
                self._weight -= self._weigh(value)
        for key in dropped:
            del self._items[key]
        self._evictions += len(dropped)

    def values(self) -> list[V]:
        """List all values, the least recently used first."""
        return list(self._items.values())

    def statistics(self) -> LRUStatistics:
        """Tell what the cache holds and has seen."""
        return LRUStatistics(len(self._items), self._weight, self._evictions)
