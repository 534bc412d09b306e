"""Which optional parts the tests find: all of them, or, on demand, not the C extensions.

With the environment variable ``QEDFUSE_HOST_CALLS`` set to ``threads`` no native thread makes calls
on the host's files.  With ``QEDFUSE_TEST_EXTENSIONS`` set to ``none``, as in
tests/without_extensions.sh, there must be no extension at all.
"""

from __future__ import annotations

import os
from typing import Final

import pytest

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE

MODULES: Final = (
    "qedfuse.check._sweep",
    "qedfuse.hostio._iothreads",
    "qedfuse.mount.fuse._extraops",
    "qedfuse.mount.sandbox._threads",
    "qedfuse.remote._crc32",
    "qedfuse.tools.inspection._maplines",
)
"""The C extensions."""

EXPECTED: Final = os.environ.get("QEDFUSE_TEST_EXTENSIONS") != "none"
"""Whether the extensions must be there."""

NATIVE_THREADS: Final = EXPECTED and os.environ.get(HOST_CALLS_VARIABLE) != "threads"
"""Whether native threads make the calls on the host's files, and not threads of trio."""

needs_extensions: Final = pytest.mark.skipif(not EXPECTED, reason="without extensions")
