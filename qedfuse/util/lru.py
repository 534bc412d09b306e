"""An LRU cache with a budget in bytes and pinned values."""

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
    """The present content of a cache, and the counters of its use.

    Attributes:
        items: How many values are in the cache.
        total_bytes: How many bytes these values take.
        evictions: How many values have been evicted so far, not counting `drop` and replacements.
    """

    items: int
    total_bytes: int
    evictions: int


class LRU(Generic[K, V]):
    """Values by key; the least recently used ones are evicted when the budget is exceeded.

    Values for which ``pinned`` returns True are not evicted, so the cache can exceed its budget.
    A later `put` evicts those that are no longer pinned.
    """

    def __init__(self, budget: int, weigh: Callable[[V], int], pinned: Callable[[V], bool]) -> None:
        """Start empty.

        Args:
            budget: Maximum number of bytes of all values.  Pinned values, and a single large one
                that was put last, can exceed it.
            weigh: Returns how many bytes a value takes; always the same number for one value.
            pinned: Returns whether a value must not be evicted now.
        """
        self._budget = budget
        self._weigh = weigh
        self._pinned = pinned
        self._items: OrderedDict[K, V] = OrderedDict()
        self._total_bytes = 0
        self._evictions = 0

    def get(self, key: K) -> V | None:
        """Return the value for ``key``, and mark it as just used; None if there is no value."""
        value = self._items.get(key)
        if value is None:
            return None
        self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Store a value, in place of an earlier one for ``key``; evict others if necessary."""
        old = self._items.pop(key, None)
        if old is not None:
            self._total_bytes -= self._weigh(old)
        self._items[key] = value
        self._total_bytes += self._weigh(value)
        if self._total_bytes > self._budget:
            self._shrink(key)

    def drop(self, key: K) -> None:
        """Remove the value for ``key``, even a pinned one; do nothing if there is no value."""
        old = self._items.pop(key, None)
        if old is not None:
            self._total_bytes -= self._weigh(old)

    def _shrink(self, newest: K) -> None:
        """Evict old values until the budget holds or only pinned values and ``newest`` are left."""
        dropped = []
        for key, value in self._items.items():
            if self._total_bytes <= self._budget:
                break
            if key != newest and not self._pinned(value):
                dropped.append(key)
                self._total_bytes -= self._weigh(value)
        for key in dropped:
            del self._items[key]
        self._evictions += len(dropped)

    def values(self) -> list[V]:
        """Return all values, the least recently used first."""
        return list(self._items.values())

    def statistics(self) -> LRUStatistics:
        """Return what the cache holds, and how many values it has evicted."""
        return LRUStatistics(len(self._items), self._total_bytes, self._evictions)
