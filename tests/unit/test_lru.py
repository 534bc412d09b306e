"""The LRU cache keeps the values used last, within its budget."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from qedfuse.util.lru import LRU


def cache(budget: int, pinned: set[bytes] | None = None) -> LRU[int, bytes]:
    """Make a cache of byte strings that weigh their length."""
    held = pinned or set()
    return LRU(budget, len, lambda value: value in held)


def test_least_recently_used_goes_first() -> None:
    """The value that was not looked up is evicted first."""
    lru = cache(2)
    lru.put(1, b"a")
    lru.put(2, b"b")
    assert lru.get(1) == b"a"
    lru.put(3, b"c")
    assert lru.get(2) is None
    assert lru.values() == [b"a", b"c"]


def test_statistics_count_items_bytes_and_evictions() -> None:
    """The statistics are the number of items, their bytes, and the evictions so far."""
    lru = cache(10)
    lru.put(1, b"12345")
    lru.put(2, b"123456")
    assert lru.get(1) is None
    assert lru.get(2) == b"123456"
    found = lru.statistics()
    assert (found.items, found.total_bytes, found.evictions) == (1, 6, 1)


def test_pinned_values_stay_and_leave_later() -> None:
    """Pinned values may exceed the budget, and are evicted at the first put after unpinning."""
    pinned = {b"aaaa", b"bbbb"}
    lru = cache(4, pinned)
    lru.put(1, b"aaaa")
    lru.put(2, b"bbbb")
    assert lru.statistics().total_bytes == 8
    pinned.clear()
    lru.put(3, b"cccc")
    assert lru.values() == [b"cccc"]


def test_newest_value_stays_although_it_is_too_large() -> None:
    """The newest value stays in the cache, even if it alone exceeds the budget."""
    lru = cache(1)
    lru.put(1, b"larger than the budget")
    assert lru.get(1) == b"larger than the budget"
    lru.put(2, b"x")
    assert lru.values() == [b"x"]


def test_replacing_a_value_counts_it_once() -> None:
    """A new value under a key replaces the bytes of the old one."""
    lru = cache(10)
    lru.put(1, b"123")
    lru.put(1, b"12345")
    assert lru.statistics().total_bytes == 5
    assert lru.values() == [b"12345"]


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.binary(min_size=1, max_size=6))),
)
def test_agrees_with_a_plain_model(budget: int, steps: list[tuple[bool, int, bytes]]) -> None:
    """After any operations the cache holds the same values as a plain model."""
    lru = cache(budget)
    model: OrderedDict[int, bytes] = OrderedDict()
    for is_put, key, value in steps:
        if is_put:
            lru.put(key, value)
            model.pop(key, None)
            model[key] = value
            while sum(map(len, model.values())) > budget and len(model) > 1:
                model.popitem(last=False)
        else:
            assert lru.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        assert lru.values() == list(model.values())
        assert lru.statistics().total_bytes == sum(map(len, model.values()))
