"""Every crash state of every case keeps the promises (D6).

A crash state is what a killed process leaves after any host write, or what a power failure can
leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.crash.cases import CASES, Case
from tests.crash.conftest import EXPLORED
from tests.crash.workloads import run_case
from tests.support.disks import header_of, inspect_image
from tests.support.explorer import Exploration, Explorer
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

STATES: Final = share(1_500, of=9_000)
"""How many states of power failures are judged for each case and seed, beside all prefixes.

With as many, `tests/crash/test_barriers.py` finds the absence of each barrier.
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_states(case: Case, seed: int, tmp_path: Path) -> None:
    """Every crash state opens, passes the check, and holds what was flushed."""
    workload = run_case(case, seed)
    history = workload.history
    assert history.misread == []
    # Writes that must be searched for zeros are left to the slow path.
    fast = workload.file.in_page_cache and case.options.detect_zeroes == "off"
    assert bool(history.fast_writes) == fast
    if case.name == "writes":
        assert bool(history.fast_flushes) == workload.file.in_page_cache
    assert len(history.resizes) == bool(case.grow_bytes)
    assert history.flushes, "something was promised"
    explorer = Explorer(case.name, seed, history, workload.bases, scratch=tmp_path)
    found = trio.run(explorer.explore, STATES)
    EXPLORED.setdefault(case.name, Exploration()).add(found)
    assert not found.violations, found.report()
    assert not header_of(workload.file.content).need_check
    left = inspect_image(workload.file.content)
    assert left.errors == ()
    if case.compacts or case.options.compact == "full":
        assert left.leaks == 0, "a compacted file has no free cluster"
    if case.leaves_no_leak:
        assert left.leaks == 0, "a close without limits leaves no free cluster"
