"""The process that served a mount: opening it, and waiting for its end."""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError
from qedfuse.mount.system.mountrecord import MountRecord, has_ended
from qedfuse.mount.system.recordlookup import find_record
from qedfuse.mount.system.visiblemounts import describe_visible_mounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.mount.system.mounttable import MountEntry

_MILLISECONDS_PER_SECOND: Final = 1000
_OTHER_MOUNTS_REPORT_SECONDS: Final = 1.0
"""Time after which the reason of a wait is reported, if the file system has another mountpoint."""
_REPORT_SECONDS: Final = 10.0
"""Time after which the reason of a wait is reported in any case."""


def open_server(record: MountRecord) -> int | None:
    """Return a pidfd of the process that wrote a record; None if the process has ended.

    Raises:
        HostError: The process may still be running, but cannot be opened or identified.
    """
    with ExitStack() as undo:
        try:
            fd = os.pidfd_open(record.pid)
            undo.callback(os.close, fd)
        except OSError as error:
            if isinstance(error, ProcessLookupError) or has_ended(record):
                return None
            name = f"process {record.pid}"
            raise HostError.from_os(error, name, "cannot wait for its end") from error
        # The process may have ended before the open, and a later process may have got its pid.
        # `has_ended` compares the start times.  If they match now, the descriptor is that of the
        # process that wrote the record.
        if has_ended(record):
            return None
        undo.pop_all()
    return fd


class ServerProcess:
    """The process that served a mount, and for whose end the caller waits."""

    def __init__(self, pidfd: int, pid: int, entry: MountEntry) -> None:
        """Use the process ``pid``, which served the mount ``entry``, and is open as ``pidfd``.

        The caller must close the descriptor.
        """
        self._pidfd = pidfd
        self._pid = pid
        self._entry = entry

    def wait(self, seconds: float | None, report: Callable[[str], None]) -> bool:
        """Wait for the end of the process; return False if it has not ended in ``seconds``.

        Args:
            seconds: The time limit; None for no limit; 0 to return immediately.
            report: Called at most once, with a line about why the process has not ended, if the
                wait is long.
        """
        start = time.monotonic()
        reported = False
        for elapsed in (_OTHER_MOUNTS_REPORT_SECONDS, _REPORT_SECONDS):
            if seconds is not None and seconds <= elapsed:
                break
            if self._has_ended(start + elapsed - time.monotonic()):
                return True
            if not reported and (
                elapsed == _REPORT_SECONDS or self._describe_other_mounts() is not None
            ):
                report(self.describe())
                reported = True
        return self._has_ended(None if seconds is None else start + seconds - time.monotonic())

    def _has_ended(self, seconds: float | None) -> bool:
        """Wait for at most ``seconds`` (None: no limit); return whether the process has ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(
            poll.poll(None if seconds is None else max(0.0, seconds) * _MILLISECONDS_PER_SECOND)
        )

    def describe(self) -> str:
        """Return one line about why the process has not ended."""
        mounts = self._describe_other_mounts()
        if mounts is None:
            return (
                f"unmounted, but process {self._pid} has not ended: the process is writing or "
                "stopped, or the mount has a copy in a mount namespace that is not visible here "
                "(to end the process, send SIGTERM to it twice)"
            )
        return f"unmounted here, but {mounts}; process {self._pid} goes on until no mount is left"

    def _describe_other_mounts(self) -> str | None:
        """Describe where else the file system is mounted; None if no other mount is visible."""
        try:
            found = find_record(self._entry.device, self._entry.owner)
        except HostError:
            found = None
        if found is not None and found.record.pid != self._pid:
            # The file system is gone, and its device number belongs to a new mount.
            return None
        return describe_visible_mounts(self._entry.device, self._entry)
