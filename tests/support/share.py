"""How much of a large test each run does: a fixed share, or all of it with ``tests/run.sh --all``.

The share is the beginning: the first seeds, the first states that are drawn.  So a failure in CI
belongs to the change under test, and is repeated by the same command.
"""

from __future__ import annotations

import os
from typing import Final

ALL: Final = os.environ.get("QEDFUSE_TEST_SHARE") == "all"
"""Whether all is done in place of the share."""


def share(part: int, *, of: int) -> int:
    """Return how many of ``of`` cases this run does: ``part`` of them, or all."""
    return of if ALL else part
