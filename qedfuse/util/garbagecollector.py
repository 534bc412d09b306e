"""How often Python's collector of reference cycles runs: rarely while a program starts.

Loading modules makes many objects that stay.  Visiting them again and again took 7 percent of the
processor time of a start.
"""

from __future__ import annotations

import gc
from typing import Final

_DEFAULT: Final = gc.get_threshold()
_RARELY: Final = (50_000, *_DEFAULT[1:])
"""Thresholds for the start; finite, so that memory is bounded if the start takes long."""


def collect_rarely() -> None:
    """Let the collector run rarely, until `collect_as_usual` is called."""
    gc.set_threshold(*_RARELY)


def collect_as_usual() -> None:
    """Let the collector run as often as by default, but never visit the objects that exist now.

    A collection that visits the objects of all modules would delay requests.  Does nothing if the
    thresholds are not those of `collect_rarely`.
    """
    if gc.get_threshold() == _RARELY:
        gc.freeze()
        gc.set_threshold(*_DEFAULT)
