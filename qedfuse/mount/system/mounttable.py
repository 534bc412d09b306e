"""The kernel's mount table, ``/proc/PID/mountinfo``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import MountpointError, PrivilegeError, proc_missing
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

FUSE_TYPE: Final = "fuse.qedfuse"
"""The type that the mount table shows for mounts of qedfuse."""


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mount, a line of the mount table.

    Attributes:
        mount_id: The id of the mount, unique as long as the mount exists.
        parent_id: The ``mount_id`` of the mount on which this mount lies.
        device: The device number of the file system, ``MAJOR:MINOR``.
        path: The mountpoint, as an absolute path for the process whose mount table was read.
        fstype: The type of the file system; `FUSE_TYPE` for a mount of qedfuse.
        source: What is mounted, the column SOURCE of findmnt(8).
        owner: The uid of the user who mounted a FUSE file system; 0 for any other file system.
        peer_group: The peer group of the mount (``shared`` in mount_namespaces(7)); 0 if none.
        master: The peer group from which unmounts propagate to this mount, but not back; 0 if none.
    """

    mount_id: int
    parent_id: int
    device: str
    path: str
    fstype: str
    source: str
    owner: int
    peer_group: int = 0
    master: int = 0


def _unescape(field: str) -> str:
    r"""Decode the octal escapes of a field, such as ``\040`` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def parse_mounts(table: str) -> Iterator[MountEntry]:
    r"""Yield the mounts in the text of a mountinfo file (proc_pid_mountinfo(5)).

    Incomplete lines are skipped.  The kernel escapes space, tab, newline, backslash and ``#`` in
    names.  Other characters that Python counts as white space or as a line end are not escaped.  So
    lines are split only at newlines, and fields only at spaces.
    """
    for line in table.split("\n"):
        # 36 35 0:42 / /mnt rw,noatime shared:1 - fuse.qedfuse /a.qed rw,user_id=0,group_id=0
        front, _, back = line.partition(" - ")
        fields, tail = front.split(" "), back.split(" ")
        if len(fields) > 4 and len(tail) > 2:  # noqa: PLR2004  the fields that are used
            owner = re.search(r"(?:^|,)user_id=([0-9]+)", tail[2])
            groups = dict(re.findall(r" (shared|master):([0-9]+)", front))
            yield MountEntry(
                *(int(fields[0]), int(fields[1]), fields[2], _unescape(fields[4])),
                *(_unescape(tail[0]), _unescape(tail[1]), int(owner[1]) if owner else 0),
                *(int(groups.get("shared", 0)), int(groups.get("master", 0))),
            )


def read_mounts(process: int | None = None) -> list[MountEntry]:
    """List the mounts that a process sees, in the order of the mount table.

    Args:
        process: The pid of the process; None for the process that calls this function.

    Raises:
        OSError: No process has the pid, or the caller may not inspect the process.
        HostError: ``process`` is None, and /proc is not mounted.
    """
    directory = "self" if process is None else str(process)
    try:
        table = Path(f"/proc/{directory}/mountinfo").read_bytes()
    except FileNotFoundError as error:
        if process is None:
            raise proc_missing() from error
        raise
    return list(parse_mounts(os.fsdecode(table)))


def find_mount(mountpoint: str) -> MountEntry | None:
    """Return the topmost mount on a path; None if there is none.

    Only the mount table is read.  An access to the mount itself would wait for its server.

    Args:
        mountpoint: The path, absolute and free of symbolic links.

    Raises:
        HostError: /proc is not mounted.
    """
    found = None
    for entry in read_mounts():
        if entry.path == mountpoint:
            found = entry
    return found


def find_qedfuse_mount(mountpoint: str) -> MountEntry:
    """Return the topmost mount on a path, which must be a mount of qedfuse.

    Raises:
        MountpointError: Nothing is mounted on the path, or the topmost mount is not of qedfuse.
        HostError: /proc is not mounted.
    """
    shown = printable(mountpoint)
    entry = find_mount(mountpoint)
    if entry is None:
        msg = f"{shown}: found no mount, expected a mount of qedfuse"
        raise MountpointError(msg)
    if entry.fstype != FUSE_TYPE:
        msg = f"{shown}: found a mount of type {printable(entry.fstype)}, expected {FUSE_TYPE}"
        raise MountpointError(msg)
    return entry


def find_own_mount(mountpoint: str, action: str) -> MountEntry:
    """Return the mount of qedfuse on a path; refuse callers other than its owner and root.

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        action: What only the owner of the mount and root can do, for the message.

    Raises:
        MountpointError: See `find_qedfuse_mount`.
        PrivilegeError: The mount belongs to another user, and the caller is not root.
        HostError: /proc is not mounted.
    """
    entry = find_qedfuse_mount(mountpoint)
    user = os.geteuid()
    if user not in (0, entry.owner):
        msg = (
            f"{printable(mountpoint)}: found a mount of user {entry.owner}, expected one of user "
            f"{user} (only its owner and root can {action})"
        )
        raise PrivilegeError(msg)
    return entry
