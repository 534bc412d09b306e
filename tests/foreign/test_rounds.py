"""Random chains that mix formats: a few rounds of `tests.foreign.rounds`."""

from __future__ import annotations

from collections import Counter

from tests.foreign.rounds import run_round
from tests.support.share import share


def test_rounds() -> None:
    """All commands give what qemu-img gives, and each kind of case happens."""
    happened = Counter[str]()
    # QEMU refuses some commits that qedimg does.  Of the first two seeds, qedimg refuses the commit
    # of one, and both programs do that of the other.
    for seed in range(5, 5 + share(2, of=20)):
        happened += run_round(seed)
    for kind in ("compare: 0", "compare: 1", "commit: refused", "commit: allowed", "rebase"):
        assert happened[kind]
    assert happened["commit: compared"]
    assert happened["rebase -u: changed"]
