"""Finding the mounts of one file system, even bind mounts and copies in other mount namespaces.

A new mount namespace, such as that of a container, begins with a copy of every mount.  A file
system and its server end only when the last of its mounts is unmounted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.mount.system.mounttable import MountEntry, read_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_LISTED_MOUNTS: Final = 5
"""Maximum number of mounts that `describe_visible_mounts` lists."""


@dataclass(frozen=True, slots=True)
class VisibleMount:
    """One mount of a file system, and a process that sees the mount.

    Attributes:
        path: The mountpoint, as the process sees it.
        pid: The pid of the process; None for the caller itself.
        command: The name of the process (proc_pid_comm(5)); ``ended`` if it has ended; empty for
            the caller itself.
    """

    path: str
    pid: int | None = None
    command: str = ""

    def __str__(self) -> str:
        """Describe where the mount is, on one line."""
        if self.pid is None:
            return f"at {printable(self.path)}"
        return f"at {printable(self.path)} for process {self.pid} ({printable(self.command)})"


def find_visible_mounts(device: str, original: MountEntry | None = None) -> list[VisibleMount]:
    """List the mounts of a file system that the caller or other processes see.

    The mounts that the caller sees come first.  Each further mount is listed with one process that
    sees it, the one with the lowest pid.  Two kinds of mounts are left out:

    - Mounts in other namespaces that the kernel normally unmounts together with a mount that the
      caller sees.  They are in its peer group (`MountEntry.peer_group`), or unmounts propagate to
      them from this group.
    - Mounts that are visible only to processes that /proc hides (the option ``hidepid``).

    Args:
        device: The device number of the file system, ``MAJOR:MINOR``.
        original: A mount of the file system, as the mount table showed it earlier; None for no
            comparison.  Mounts with another source or owner are left out, because the device
            number may belong to another file system by now.

    Raises:
        HostError: /proc is not mounted.
    """
    own = _mounts(device, None, original) or []
    mounts = [VisibleMount(entry.path) for entry in own]
    mount_ids = {entry.mount_id for entry in own}
    others = []
    seen = {_namespace_and_root("self")}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):  # noqa: PTH208
        namespace_and_root = _namespace_and_root(str(pid))
        if namespace_and_root in seen:
            continue
        entries = _mounts(device, pid, original)
        if entries is None:
            # The process has ended.  Others with the same namespace and root are still asked.
            continue
        seen.add(namespace_and_root)
        for entry in entries:
            if entry.mount_id not in mount_ids:
                mount_ids.add(entry.mount_id)
                others.append((entry, pid))
    reached = _reached_groups(own, [entry for entry, _pid in others])
    mounts += (
        VisibleMount(entry.path, pid, _command(pid))
        for entry, pid in others
        if reached.isdisjoint((entry.peer_group, entry.master))
    )
    return mounts


def _reached_groups(own: Iterable[MountEntry], others: Iterable[MountEntry]) -> set[int]:
    """Return the peer groups to which unmounts of the mounts ``own`` propagate."""
    reached = {entry.peer_group for entry in own} - {0}
    while True:
        # A slave mount can be in a peer group of its own.  Unmounts propagate to that group, too.
        slaves = {entry.peer_group for entry in others if entry.master in reached}
        if slaves <= reached | {0}:
            return reached
        reached |= slaves - {0}


def describe_visible_mounts(device: str, original: MountEntry | None = None) -> str | None:
    """Describe on one line where a file system is mounted; None if no mount of it is visible.

    At most `_MAX_LISTED_MOUNTS` mounts are listed, and the others are counted.  For arguments and
    errors see `find_visible_mounts`.
    """
    mounts = find_visible_mounts(device, original)
    if not mounts:
        return None
    more = len(mounts) - _MAX_LISTED_MOUNTS
    listed = ", ".join(map(str, mounts[:_MAX_LISTED_MOUNTS]))
    return f"still mounted {listed}" + (f" and {more} more" if more > 0 else "")


def _namespace_and_root(process: str) -> tuple[str, str]:
    """Return the mount namespace and the root directory of a process.

    Processes with the same result see the same mounts.
    """
    try:
        # The links are read and not followed, because a target may be a mount that does not answer.
        return os.readlink(f"/proc/{process}/ns/mnt"), os.readlink(f"/proc/{process}/root")  # noqa: PTH115
    except OSError:
        return process, ""


def _mounts(device: str, pid: int | None, original: MountEntry | None) -> list[MountEntry] | None:
    """List the mounts of a file system that the process ``pid`` (None: the caller) sees.

    Returns None if the process has ended, or if /proc hides it.
    """
    try:
        entries = read_mounts(pid)
    except OSError:
        return None
    return [
        entry
        for entry in entries
        if entry.device == device
        and (original is None or (entry.source, entry.owner) == (original.source, original.owner))
    ]


def _command(pid: int) -> str:
    """Return the name of a process; ``ended`` if there is no such process."""
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes())
    except OSError:
        return "ended"
    return name.removesuffix("\n")
