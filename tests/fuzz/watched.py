"""A case under a watchdog: a hang is a finding, and its stacks are printed."""

from __future__ import annotations

import faulthandler
import sys
from typing import TYPE_CHECKING, Final

from tests.fuzz.case import run_case

if TYPE_CHECKING:
    from pathlib import Path

_HANG_SECONDS: Final = 300.0
"""A case takes some seconds, and many times that on a busy machine."""


def run_watched(seed: int, directory: Path) -> None:
    """Carry out a case; end the process if it does not end.

    Raises:
        AssertionError: It has found something.
    """
    sys.stderr.flush()
    faulthandler.enable()
    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    try:
        run_case(seed, directory)
    finally:
        faulthandler.cancel_dump_traceback_later()
