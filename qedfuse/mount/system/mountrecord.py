"""Mount records, by which ``qedfuse umount`` finds the server of a mount.

Each mount has one record, in a file of its own:

    /run/qedfuse/0:42.1234                 for root
    $XDG_RUNTIME_DIR/qedfuse/0:42.1234     for other users, if this directory can be made or opened
    /run/user/UID/qedfuse/0:42.1234        otherwise, if this directory can be made or opened
    /tmp/qedfuse-UID/0:42.1234             otherwise

The file name is the device number of the mount and the pid of the server.  The mount table shows
the device number of every mount, even if its server has ended.  The pid is needed as well: the
kernel can use the device number again while the server of the old mount is closing its images.

The server removes its record when all images are safely closed.  If something failed, the server
writes the reason into the record instead.  ``qedfuse umount``, or a later mount of the same user,
removes what is left (`qedfuse.mount.system.recordfile`).
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from qedfuse.errors import HostError
from qedfuse.mount.system.recorddirectory import NO_RECORD

_MAX_RECORD_BYTES: Final = 1 << 20
"""Maximum number of bytes that are read of a record; a longer record is not valid."""
_MAX_PID: Final = 1 << 22
_MAX_TIME: Final = (1 << 64) - 1
_MAX_EXIT_CODE: Final = 255


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a server records about its mount; the fields are the keys of a JSON object.

    Attributes:
        pid: The pid of the server.
        started: When the server started, in clock ticks since boot, to distinguish it from a later
            process with the same pid; 0 if unknown.
        mountpoint: The mountpoint.
        sources: The images.
        failure: What failed, written when the server ends; None before that.
        exit_code: The exit code of the server; 0 if ``failure`` is None.
        options: All mount options, each as for ``-o``, with absolute paths.
        mounted: When the mount was made, in nanoseconds since boot (CLOCK_BOOTTIME); 0 if unknown.
    """

    pid: int
    started: int
    mountpoint: str
    sources: tuple[str, ...]
    failure: str | None = None
    exit_code: int = 0
    options: tuple[str, ...] = ()
    mounted: int = 0


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is no such process.

    Raises:
        HostError: The start time cannot be read for another reason.
    """
    path = f"/proc/{pid}/stat"
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise HostError.from_os(error, path, "cannot read") from error
    # The fields (proc_pid_stat(5)) are counted from the last parenthesis, which ends the name,
    # because the name may contain spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def has_ended(record: MountRecord) -> bool:
    """Return whether the server that wrote a record has ended.

    Raises:
        HostError: The start time of the process with the server's pid cannot be read.
    """
    start = process_start(record.pid)
    return start is None or record.started not in (0, start)


def format_record(record: MountRecord) -> bytes:
    """Return a record as the text that `read_record` reads."""
    return json.dumps(asdict(record)).encode()


def read_record(directory: int, name: str, user: int) -> MountRecord | None:
    """Return the record in the file ``name``; None if it is not a valid record of ``user``.

    Raises:
        OSError: The file may have a valid record, but cannot be opened or read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in NO_RECORD:
            return None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != user:
            return None
        return _parse(os.read(fd, _MAX_RECORD_BYTES))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    finally:
        os.close(fd)


def _parse(text: bytes) -> MountRecord:
    """Parse the text of a record, which is untrusted: root reads the records of all users."""
    data = json.loads(text)
    # Earlier versions of qedfuse wrote no options and no time of the mount.
    lists = {"sources": data["sources"], "options": data.get("options", [])}
    record = MountRecord(**{**data, **{name: tuple(items) for name, items in lists.items()}})
    if not (
        all(type(items) is list for items in lists.values())
        and all(type(item) is str for items in lists.values() for item in items)
        and type(record.mountpoint) is str
        and type(record.failure) in (str, type(None))
        and _is_number(record.pid, 1, _MAX_PID)
        and _is_number(record.started, 0, _MAX_TIME)
        and _is_number(record.mounted, 0, _MAX_TIME)
        and _is_number(record.exit_code, 0, _MAX_EXIT_CODE)
    ):
        msg = "expected a mount record"
        raise TypeError(msg)
    return record


def _is_number(value: object, minimum: int, maximum: int) -> bool:
    """Return whether a value is an `int` from ``minimum`` to ``maximum``; False for a boolean."""
    return type(value) is int and minimum <= value <= maximum
