"""Announcing a mount to other processes: pid file, mount record and service manager.

All paths are resolved before the mount exists.  If the server resolved a path later, and the path
led through the mount, the server would wait forever for its own reply.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from qedfuse.errors import QedError
from qedfuse.mount.process.pidfile import PidFile
from qedfuse.mount.process.servicemanager import ServiceManager
from qedfuse.mount.system.mountpoint import is_below
from qedfuse.mount.system.mountrecord import MountRecord, process_start
from qedfuse.mount.system.recordfile import MountRecordFile
from qedfuse.text import printable
from qedfuse.util.landlock import CHANGE_FILES

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

_NO_RECORD = "%s: qedfuse umount will not find this mount's process"


class Announcement:
    """Announces one mount.

    Make this object before the mount exists, and call `withdraw` after the end of the mount.
    """

    def __init__(
        self,
        mountpoint: str,
        sources: tuple[str, ...],
        option_strings: tuple[str, ...],
        pidfile: str | None,
        ready: Callable[[], None],
    ) -> None:
        """Open the directories of pid file and mount record; connect to the service manager.

        Args:
            mountpoint: The mountpoint, absolute and free of symbolic links.
            sources: The sources, for the mount record.
            option_strings: The options, for the mount record.
            pidfile: The path of the pid file; None to write no pid file.
            ready: Called by the method `ready`; raises QedError if the process that waits for the
                mount has ended.

        Raises:
            HostError: The pid file is refused, as in `PidFile`.
        """
        self._mountpoint = mountpoint
        self._sources = sources
        self._options = option_strings
        self._ready = ready
        self._pidfile = None if pidfile is None else PidFile(pidfile)
        if self._pidfile is not None and is_below(self._pidfile.path, mountpoint):
            _log.warning(
                "the mount hides the pid file %s, because the file lies under the mountpoint",
                printable(self._pidfile.path),
            )
        self._record: MountRecordFile | None = None
        try:
            self._record = MountRecordFile()
        except QedError as error:
            _log.warning(_NO_RECORD, error)
        self._manager = ServiceManager()

    def write_record(self, device: str) -> None:
        """Write the mount record, with the present time as the mount time; log a failure.

        Without a directory for the record, this method does nothing.

        Args:
            device: The device number of the mount, ``MAJOR:MINOR``.
        """
        if self._record is None:
            return
        pid = os.getpid()
        try:
            record = MountRecord(
                *(pid, process_start(pid) or 0, self._mountpoint, self._sources),
                options=self._options,
                mounted=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            )
            self._record.write(device, record)
        except QedError as error:
            _log.warning(_NO_RECORD, error)

    def statistics_socket(self) -> socket.socket | None:
        """Make the socket for ``qedfuse stats``; the caller must call `write_record` before.

        Returns None if there is no record.  Also returns None, and logs the reason, after a
        failure.
        """
        if self._record is None or not self._record.is_written:
            return None
        try:
            return self._record.listen()
        except QedError as error:
            _log.warning("%s: qedfuse stats will not find this mount's process", error)
            return None

    def write_pidfile(self) -> None:
        """Write the pid file, if the user wants one; the caller must call `ready` afterwards.

        Raises:
            HostError: The pid file cannot be written.
        """
        if self._pidfile is not None:
            self._pidfile.write()

    def needed_files(self) -> Iterator[tuple[int, int]]:
        """Yield a descriptor and the necessary Landlock rights for each file `withdraw` uses.

        A descriptor is valid only until the next one is requested.
        """
        if self._record is not None:
            yield self._record.directory, CHANGE_FILES
        if self._pidfile is not None:
            yield from self._pidfile.needed_files()

    def ready(self) -> None:
        """Announce that the disks can be used.

        Raises:
            QedError: The process that waited for the mount has ended.
        """
        self._ready()
        self._manager.notify("READY=1")

    def stopping(self) -> None:
        """Announce that the mount is gone and its images are being closed."""
        self._manager.notify("STOPPING=1")

    def withdraw(self, failure: str | None, exit_code: int) -> None:
        """Remove the pid file, and the mount record if nothing failed; close everything.

        Call this last, because a missing mount record means that the images were closed safely.

        Args:
            failure: A text for the mount record about what failed; None if nothing failed.
            exit_code: The exit code of the process, recorded with the failure.
        """
        self._manager.close()
        if self._pidfile is not None:
            self._pidfile.remove()
            self._pidfile.close()
        if self._record is not None:
            self._record.finish(failure, exit_code)
