"""Calls in a child process that the caller abandons after a time limit."""

from __future__ import annotations

import os
from pathlib import Path

from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.util.descriptors import open_descriptors


def test_the_child_keeps_nothing_of_its_caller_open() -> None:
    """A child that blocks in the kernel keeps no descriptor of its caller open."""
    reading, writing = os.pipe()
    found = call_in_child(open_descriptors, 30)
    assert {reading, writing} & found == set()
    assert len(found) == 4  # the standard ones, and the way back
    assert call_in_child(lambda: str(Path("/proc/self/fd/1").readlink()), 30) == "/dev/null"
    os.close(reading)
    os.close(writing)
