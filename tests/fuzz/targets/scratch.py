"""Files for the targets that open a path; in memory, if the machine has a directory in memory."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Final

_MEMORY: Final = Path("/dev/shm")  # noqa: S108  the directory below it has a random name
PARENT_VARIABLE: Final = "QEDFUSE_FUZZ_DIRECTORY"
"""Names a directory for the files, which the parent removes if this process ends abruptly."""


def memory_directory() -> str | None:
    """Return a directory in memory; None if the machine has none."""
    return str(_MEMORY) if os.access(_MEMORY, os.W_OK) else None


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Return the directory of this process, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(
        prefix="qedfuse-fuzz-", dir=os.environ.get(PARENT_VARIABLE, memory_directory())
    )


@functools.cache
def scratch(name: str) -> Path:
    """Return an empty directory of a target, the same one in each call."""
    path = Path(_root().name, name)
    path.mkdir()
    return path


def put(path: Path, content: bytes | bytearray) -> str:
    """Write a file, replacing its content; return its path as a string."""
    with open(path, "wb", buffering=0) as file:  # noqa: PTH123  unbuffered
        file.write(content)
    return str(path)
