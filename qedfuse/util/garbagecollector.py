"""How often Python's collector of reference cycles runs: rarely while a program starts.

Loading modules makes many objects that stay, and by default the collector visits these objects
again and again.  These visits took 7 percent of the processor time of a start.
"""

from __future__ import annotations

import gc
from typing import Final

_DEFAULT: Final = gc.get_threshold()
_RARELY: Final = (50_000, *_DEFAULT[1:])
"""Thresholds for the start.  They are finite, so that memory is bounded if the start takes long."""


def collect_rarely() -> None:
    """Let the collector run rarely, until `collect_as_usual` is called."""
    gc.set_threshold(*_RARELY)


def collect_as_usual() -> None:
    """Let the collector run as often as by default, but never visit the objects that exist now.

    A collection that visits the objects of all modules would delay requests.  Without a call of
    `collect_rarely` before, nothing changes.
    """
    if gc.get_threshold() == _RARELY:
        gc.freeze()
        gc.set_threshold(*_DEFAULT)
