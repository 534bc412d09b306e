"""The files that another process has open."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def open_files(pid: int) -> dict[int, str]:
    """Return what each descriptor of a process leads to, as ``/proc/PID/fd`` shows it.

    A descriptor that the process closes meanwhile is left out.
    """
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)  # noqa: PTH115  Path refuses such targets
    return found
