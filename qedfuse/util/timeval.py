"""Timeouts of sockets in the form that the kernel takes."""

from __future__ import annotations

import struct
from typing import Final

_TIMEVAL: Final = struct.Struct("ll")
"""The C struct timeval: seconds and microseconds."""

NO_TIMEOUT: Final = _TIMEVAL.pack(0, 0)
"""The value of SO_RCVTIMEO or SO_SNDTIMEO with which a call waits without a limit."""


def timeval(seconds: float) -> bytes:
    """Return the value of SO_RCVTIMEO or SO_SNDTIMEO for a finite number of seconds.

    The value is at least a microsecond, because the kernel takes zero for no timeout.
    """
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
