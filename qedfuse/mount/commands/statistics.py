"""``qedfuse stats``: asking the processes that serve mounts for their statistics."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qedfuse.errors import MountpointError, QedError
from qedfuse.mount.statistics.version import VERSION
from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.mount.system.mountpoint import resolve_mounted
from qedfuse.mount.system.mounttable import (
    FUSE_TYPE,
    MountEntry,
    find_own_mount,
    read_mounts,
)
from qedfuse.mount.system.recorddirectory import STATISTICS_SUFFIX
from qedfuse.mount.system.recordlookup import find_record, open_record_directory
from qedfuse.mount.system.statisticssocket import UnusableServerError, receive
from qedfuse.text import printable, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_SHOWN: Final = 100
"""Maximum number of characters of an unknown version that a message shows."""
_MAX_SECONDS: Final = 5.0
"""Maximum time to wait for the statistics of a mount."""


class NoStatisticsError(QedError):
    """A mount has no statistics to show, or they are not of this version."""


class _Answer(NamedTuple):
    """The result of the child process that asks for statistics.

    Attributes:
        mountpoint: The mountpoint to which the path has led.
        document: The text of the document; None if the server has sent no document.
        reason: Why there is no document; empty if there is a document.
    """

    mountpoint: str
    document: bytes | None
    reason: str = ""


def find_mountpoints() -> list[str]:
    """Return the mountpoints whose statistics this user may read, oldest mount first.

    Root may read those of all users.

    Raises:
        HostError: /proc is not mounted.
    """
    user = os.geteuid()
    paths = [
        entry.path
        for entry in read_mounts()
        if entry.fstype == FUSE_TYPE and user in (0, entry.owner)
    ]
    return list(dict.fromkeys(paths))


def read_statistics(path: str, seconds: float = _MAX_SECONDS) -> dict[str, Any]:
    """Return the statistics of the mount to which a path leads, as docs/stats.md describes them.

    The calling process must have only one thread (`call_in_child`).

    Args:
        path: The mountpoint, or a symbolic link to it.
        seconds: Maximum time to wait, for the path and for the server.

    Raises:
        MountpointError: The path leads to no mount of qedfuse.
        PrivilegeError: The mount belongs to another user, and the caller is not root.
        NoStatisticsError: The server cannot be found, does not answer in time, or sends no document
            of this version.
        HostError: A directory or a record cannot be read, /proc is not mounted, or the child
            process fails.
    """
    try:
        answer = call_in_child(partial(_ask, path), seconds)
    except TimeoutError:
        msg = (
            f"{printable(path)}: no statistics: the process that serves the mount, or the path to "
            f"it, does not answer (waited {seconds:g} s)"
        )
        raise NoStatisticsError(msg) from None
    shown = printable(answer.mountpoint)
    if answer.document is None:
        msg = f"{shown}: no statistics: {answer.reason}"
        raise NoStatisticsError(msg)
    try:
        document = json.loads(answer.document)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        msg = (
            f"{shown}: no statistics: found {len(answer.document)} bytes that are not a document "
            "of statistics, perhaps because the process has just ended"
        )
        raise NoStatisticsError(msg)
    if document.get("version") != VERSION:
        version = document.get("version")
        # The document is untrusted: it can have anything here, of any length.
        is_number = type(version) is int
        found = shortened(str(version), _MAX_SHOWN) if is_number else "another kind of value"
        msg = f"{shown}: statistics: version: found {found}, expected {VERSION}"
        raise NoStatisticsError(msg)
    return document


def _ask(path: str) -> _Answer:
    """Find the server of a mount, and return its answer; the call may block forever."""
    mountpoint = resolve_mounted(path)
    entry = find_own_mount(mountpoint, "read its statistics")
    return _ask_server(mountpoint, entry)


def _ask_server(mountpoint: str, entry: MountEntry) -> _Answer:
    """Return the answer of the server of the mount ``entry``."""
    found = find_record(entry.device, entry.owner)
    directory = None if found is None else open_record_directory(found.path, entry.owner)
    if found is None or directory is None:
        reason = "found no record of the process that serves the mount"
        return _Answer(mountpoint, None, reason)
    document, reason = b"", ", has closed the connection without an answer"
    try:
        document = receive(directory, found.path.name + STATISTICS_SUFFIX, (entry.owner,))
    except FileNotFoundError:
        reason = ", has no socket for statistics"
    except ConnectionRefusedError:
        reason = ", has ended"
    except UnusableServerError as error:
        reason = f": {error}"
    except OSError as error:
        reason = f": {error.strerror}"
    finally:
        os.close(directory)
    if not document:
        reason = f"process {found.record.pid}, which serves the mount{reason}"
        return _Answer(mountpoint, None, reason)
    return _Answer(mountpoint, document)


def mountpoints_to_ask(path: str | None) -> Sequence[str]:
    """Return ``path`` alone; if it is None, return the result of `find_mountpoints`.

    Raises:
        MountpointError: ``path`` is None, and there is no mount that this user may ask.
        HostError: /proc is not mounted.
    """
    if path is not None:
        return [path]
    found = find_mountpoints()
    if not found:
        whose = f" of user {user}" if (user := os.geteuid()) else ""  # root may ask all
        msg = f"stats: found no mount of qedfuse{whose}, expected at least one"
        raise MountpointError(msg)
    return found
