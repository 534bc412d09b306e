"""The kernel's mount table, ``/proc/PID/mountinfo``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import MountpointError, proc_missing
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

FUSE_TYPE: Final = "fuse.qedfuse"
"""The type that the mount table shows for mounts of qedfuse."""


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of the mount table.

    Attributes:
        number: The mount; no other mount of any mount namespace has the number meanwhile.
        parent: The number of the mount on which this one is mounted.
        device: ``MAJOR:MINOR`` of the file system, which no other has at the same time.
        path: The mountpoint, from the root directory of the process whose table it is.
        fstype: The type of the file system; that of qedfuse is `FUSE_TYPE`.
        source: What is mounted, as mount(8) knows it.
        owner: The user who mounted it, where FUSE says so; 0 otherwise.
        peers: The number of the group whose members are unmounted together (``shared`` or
            ``master`` in mount_namespaces(7)); 0 for none.
    """

    number: int
    parent: int
    device: str
    path: str
    fstype: str
    source: str
    owner: int
    peers: int = 0


def _unescape(field: str) -> str:
    r"""Undo the mount table's escapes: a space is written ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def parse_mounts(table: str) -> Iterator[MountEntry]:
    r"""Read the text of a mountinfo file; lines that are incomplete are left out.

    The kernel escapes space, tab, newline, backslash and ``#``.  Everything else in a
    name stands for itself, also what Python takes for white space or the end of a line.
    """
    for line in table.split("\n"):
        # 36 35 0:42 / /mnt rw,noatime shared:1 - fuse.qedfuse /a.qed rw,user_id=0,group_id=0
        front, _, back = line.partition(" - ")
        fields, tail = front.split(" "), back.split(" ")
        if len(fields) > 4 and len(tail) > 2:  # noqa: PLR2004  the fields that are used
            owner = re.search(r"(?:^|,)user_id=([0-9]+)", tail[2])
            peers = re.search(r" (?:shared|master):([0-9]+)", front)
            yield MountEntry(
                *(int(fields[0]), int(fields[1]), fields[2], _unescape(fields[4])),
                *(_unescape(tail[0]), _unescape(tail[1]), int(owner[1]) if owner else 0),
                int(peers[1]) if peers else 0,
            )


def read_mounts(process: int | None = None) -> list[MountEntry]:
    """List the mounts that a process sees, by default the caller, in the order of the table.

    Raises:
        OSError: There is no such process, or the caller may not look at it.
        HostError: /proc is not mounted.
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
    """Find what is mounted on a path; of several, the last, which covers the others.

    It asks the mount table and never the mount: that would wait for the process that
    serves it, and fails where that is dead or belongs to another user.
    """
    found = None
    for entry in read_mounts():
        if entry.path == mountpoint:
            found = entry
    return found


def find_ours(mountpoint: str) -> MountEntry:
    """Find the mount of qedfuse on a path.

    Raises:
        MountpointError: There is none, or another file system covers it.
    """
    shown = printable(mountpoint)
    entry = find_mount(mountpoint)
    if entry is None:
        msg = f"{shown}: found no mount, expected one of qedfuse"
        raise MountpointError(msg)
    if entry.fstype != FUSE_TYPE:
        msg = f"{shown}: found a mount of type {printable(entry.fstype)}, expected {FUSE_TYPE}"
        raise MountpointError(msg)
    return entry
