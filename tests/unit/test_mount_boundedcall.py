"""Calls that are given up after some time."""

from __future__ import annotations

import os
from pathlib import Path

from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.util.descriptors import open_descriptors


def test_the_child_keeps_nothing_of_its_caller_open() -> None:
    """If it blocks in the kernel for ever, no pipe and no lock of the caller's stays held."""
    reading, writing = os.pipe()
    found = call_in_child(open_descriptors, 30)
    assert {reading, writing} & found == set()
    assert len(found) == 4  # the standard ones, and the way back
    assert call_in_child(lambda: str(Path("/proc/self/fd/1").readlink()), 30) == "/dev/null"
    os.close(reading)
    os.close(writing)
