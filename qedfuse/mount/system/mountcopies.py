"""Finding all mounts of one file system: bind mounts, and copies in other mount namespaces.

A new mount namespace, such as that of a container or of a systemd service, begins with a
copy of every mount.  A file system ends only when its last mount is unmounted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qedfuse.mount.system.mounttable import MountEntry, read_mounts
from qedfuse.text import printable

_MAX_LISTED_COPIES: Final = 5


@dataclass(frozen=True, slots=True)
class MountCopy:
    """A mount of a file system.

    Attributes:
        path: Its mountpoint, as the process sees it.
        pid: A process that sees the mount; None for the caller itself.
        command: The name of that process (proc_pid_comm(5)).
    """

    path: str
    pid: int | None = None
    command: str = ""

    def __str__(self) -> str:
        """Describe where the mount is, on one line."""
        if self.pid is None:
            return f"at {printable(self.path)}"
        return f"at {printable(self.path)} for process {self.pid} ({printable(self.command)})"


def find_copies(device: str, original: MountEntry | None = None) -> list[MountCopy]:
    """List the mounts of a file system that the caller or other processes see.

    Of the processes that see a copy, the one with the lowest pid is reported.  Three kinds of
    mounts are left out: mounts that the kernel unmounts together with a mount of the caller's
    namespace, mounts that only processes see which the caller may not inspect, and mounts
    that no process sees below its root directory.

    Args:
        device: The device number of the file system, ``MAJOR:MINOR``.
        original: A mount of the file system, which may be gone by now.  The kernel reuses
            device numbers, so a mount with another source or owner belongs to another file
            system and is left out.
    """
    own = _mounts(device, None, original)
    found = [MountCopy(entry.path) for entry in own]
    mount_ids = {entry.mount_id for entry in own}
    own_groups = {entry.peer_group for entry in own if entry.peer_group}
    seen = {_namespace_and_root("self")}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):  # noqa: PTH208
        visible = _namespace_and_root(str(pid))
        if visible in seen:
            continue
        seen.add(visible)
        for entry in _mounts(device, pid, original):
            if entry.mount_id not in mount_ids and entry.peer_group not in own_groups:
                mount_ids.add(entry.mount_id)
                found.append(MountCopy(entry.path, pid, _command(pid)))
    return found


def describe_copies(device: str, original: MountEntry | None = None) -> str | None:
    """Describe where a file system is mounted, on one line; None if no mount of it is visible.

    The arguments are those of `find_copies`.
    """
    copies = find_copies(device, original)
    if not copies:
        return None
    more = len(copies) - _MAX_LISTED_COPIES
    listed = ", ".join(map(str, copies[:_MAX_LISTED_COPIES]))
    return f"still mounted {listed}" + (f" and {more} more" if more > 0 else "")


def _namespace_and_root(process: str) -> tuple[str, str]:
    """Return the mount namespace and the root directory of a process, which decide what it sees.

    If the caller may not read them, the result has ``process`` itself in place of the
    namespace, and so differs from that of every other process.
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
    except OSError:  # it has ended, or the caller may not inspect it
        return []
    return [
        entry
        for entry in entries
        if entry.device == device
        and (original is None or (entry.source, entry.owner) == (original.source, original.owner))
    ]


def _command(pid: int) -> str:
    """Return the name of a process, or ``ended``."""
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes())
    except OSError:
        return "ended"
    return name.removesuffix("\n")
