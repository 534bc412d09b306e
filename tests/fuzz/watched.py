"""A case under a watchdog: a hang is a failure, and the stacks of all threads are printed."""

from __future__ import annotations

import faulthandler
import sys
from typing import TYPE_CHECKING, Final

from tests.fuzz.case import run_case

if TYPE_CHECKING:
    from pathlib import Path

_HANG_SECONDS: Final = 300.0
"""A case takes some seconds, and many times that on a busy machine."""


def run_watched(seed: int, directory: Path) -> int:
    """Run a case; return how often it killed the server; print all stacks and exit on a hang.

    Raises:
        AssertionError: The case has failed.
    """
    sys.stderr.flush()
    faulthandler.enable()
    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    try:
        return run_case(seed, directory)
    finally:
        faulthandler.cancel_dump_traceback_later()
