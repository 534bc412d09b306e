"""Where else a mount is mounted: bind mounts, and copies in other mount namespaces.

A new mount namespace, as a container or a systemd service has it, begins with a copy of
every mount.  A file system goes away only when its last mount does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qedfuse.mount.system.mounttable import MountEntry, read_mounts
from qedfuse.text import printable

_MAX_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class MountCopy:
    """A mount of a file system.

    Attributes:
        path: Its mountpoint, as the process sees it.
        pid: A process in whose mount namespace it is; None for the caller's own.
        command: What that process is called.
    """

    path: str
    pid: int | None = None
    command: str = ""

    def __str__(self) -> str:
        """Say where it is, on one line."""
        if self.pid is None:
            return f"at {printable(self.path)}"
        return f"at {printable(self.path)} for process {self.pid} ({printable(self.command)})"


def find_copies(device: str, original: MountEntry | None = None) -> list[MountCopy]:
    """List the mounts of the file system with a device number, ``MAJOR:MINOR``.

    Of each copy one process is named that sees it, that with the lowest number.  What goes
    away together with a mount of the caller's namespace is left out, and so is what the
    caller may not look at, and a copy that no process sees below its root directory.

    Args:
        device: The number.
        original: A mount of the file system that may have gone by now; what shows another
            source or owner is another file system, which has got the number since.
    """
    own = _mounts(device, None, original)
    found = [MountCopy(entry.path) for entry in own]
    numbers = {entry.number for entry in own}
    together = {entry.peers for entry in own if entry.peers}
    seen = {_view("self")}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):  # noqa: PTH208
        view = _view(str(pid))
        if view in seen:
            continue
        seen.add(view)
        for entry in _mounts(device, pid, original):
            if entry.number not in numbers and entry.peers not in together:
                numbers.add(entry.number)
                found.append(MountCopy(entry.path, pid, _command(pid)))
    return found


def describe_copies(device: str, original: MountEntry | None = None) -> str | None:
    """Say where a file system is mounted, on one line; None if that cannot be seen.

    The arguments are those of `find_copies`.
    """
    copies = find_copies(device, original)
    if not copies:
        return None
    more = len(copies) - _MAX_SHOWN
    shown = ", ".join(map(str, copies[:_MAX_SHOWN])) + (f" and {more} more" if more > 0 else "")
    return f"still mounted {shown}"


def _view(process: str) -> tuple[str, str]:
    """Name what decides which mounts a process sees: its mount namespace and its root.

    The process itself stands for what may not be seen.
    """
    try:
        # The link is read and not followed: its target may be a mount that does not answer.
        return os.readlink(f"/proc/{process}/ns/mnt"), os.readlink(f"/proc/{process}/root")  # noqa: PTH115
    except OSError:
        return process, ""


def _mounts(device: str, pid: int | None, original: MountEntry | None) -> list[MountEntry]:
    """List the mounts of the file system that a process sees; see `find_copies`."""
    try:
        entries = read_mounts(pid)
    except OSError:  # it has ended, or must not be looked at
        return []
    return [
        entry
        for entry in entries
        if entry.device == device
        and (original is None or (entry.source, entry.owner) == (original.source, original.owner))
    ]


def _command(pid: int) -> str:
    """Return the name of a process."""
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes())
    except OSError:
        return "ended"
    return name.removesuffix("\n")
