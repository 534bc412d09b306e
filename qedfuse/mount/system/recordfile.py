"""The file with the record of one mount, and the removal of records of servers that have ended."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError
from qedfuse.mount.system.mountrecord import (
    MountRecord,
    format_record,
    has_ended,
    process_start,
    read_record,
)
from qedfuse.mount.system.mounttable import read_mounts
from qedfuse.mount.system.recorddirectory import (
    STATISTICS_SUFFIX,
    open_directory,
    record_directories,
    remove_socket,
)
from qedfuse.mount.system.statisticssocket import listen

if TYPE_CHECKING:
    import socket

_NEW_SUFFIX: Final = ".new"
"""The suffix of the temporary file to which a record is written before the rename."""
_ENDED_MODE: Final = 0o400
"""The mode that marks a record whose server has ended and whose mount is gone."""
_MIN_ENDED_SECONDS: Final = 60.0
"""Minimum time for which a record with `_ENDED_MODE` is kept for a running ``qedfuse umount``."""


class MountRecordFile:
    """The file with the record of one mount, from before the mount until after its end.

    The object must be made before the mount exists, because the path of its directory may later
    lead through the mount.

    Attributes:
        directory: The descriptor of the directory of the record.
    """

    def __init__(self) -> None:
        """Open a directory of records, and remove old records of servers that have ended.

        Raises:
            HostError: No directory of records can be made or opened.
            PrivilegeError: The first directory of records that can be opened has another owner, or
                others can write to it.
        """
        self._written: tuple[str, MountRecord] | None = None
        self.directory = self._open_first_usable()
        with contextlib.suppress(OSError, HostError):
            _remove_stale(self.directory)

    def write(self, device: str, record: MountRecord) -> None:
        """Write the record of a mount.

        Args:
            device: The device number of the mount, ``MAJOR:MINOR``.
            record: The record.

        Raises:
            HostError: The record cannot be written.
        """
        name = f"{device}.{record.pid}"
        self._write(name, record)
        self._written = (name, record)

    @staticmethod
    def _open_first_usable() -> int:
        """Open the first of `record_directories` that can be made or opened."""
        user = os.geteuid()
        failure: OSError | None = None
        for path in record_directories(user):
            try:
                return open_directory(path, user, make=True)
            except OSError as error:
                failure = error
        raise HostError.from_os(failure or OSError(), str(path), "cannot write the mount record")

    def _write(self, name: str, record: MountRecord) -> None:
        """Write a record to the file ``name``, atomically, so that no reader sees a part of it."""
        text = format_record(record)
        new = name + _NEW_SUFFIX
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(new, flags, 0o600, dir_fd=self.directory)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(text)
            os.rename(new, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=self.directory)
            raise HostError.from_os(error, name, "cannot write the mount record") from error

    @property
    def is_written(self) -> bool:
        """Whether `write` has succeeded."""
        return self._written is not None

    def listen(self) -> socket.socket:
        """Make the socket for statistics beside the record, which `write` must have written.

        `finish` removes the socket from the directory.

        Raises:
            HostError: The socket cannot be made.
        """
        name = "" if self._written is None else self._written[0]
        try:
            with contextlib.suppress(FileNotFoundError):  # left by a killed process with this pid
                os.unlink(name + STATISTICS_SUFFIX, dir_fd=self.directory)
            return listen(self.directory, name + STATISTICS_SUFFIX)
        except OSError as error:
            raise HostError.from_os(error, name, "cannot make the socket for statistics") from error

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Remove the record, or add a failure to it; then close the directory.

        An error of the host is ignored.

        Args:
            failure: What failed; None if nothing failed, and the record is removed.
            exit_code: The exit code of the server, recorded with the failure.
        """
        try:
            if self._written is None:
                return
            name, record = self._written
            remove_socket(self.directory, name)
            if failure is None:
                os.unlink(name, dir_fd=self.directory)
            else:
                self._write(name, replace(record, failure=failure, exit_code=exit_code))
        except (OSError, HostError):
            pass  # the mount is gone, so no caller could act on the error
        finally:
            os.close(self.directory)


def _remove_stale(directory: int) -> None:
    """Remove records of servers that have ended, unless a ``qedfuse umount`` may need them.

    The record of a killed server must stay as long as its mount.  After the unmount, ``qedfuse
    umount`` waits for the end of the server and reads the record once more.  So a record whose
    mount is gone is first made read-only.  The first mount that begins at least a minute later
    removes it.  Mounts that are only in other mount namespaces count as gone.

    Temporary files of records, and sockets for statistics, are removed without this delay if their
    server has ended.
    """
    user = os.geteuid()
    ended = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError, HostError):  # a record that cannot be read stays
            if name.endswith((_NEW_SUFFIX, STATISTICS_SUFFIX)):
                _remove_unfinished(directory, name)
            elif (record := read_record(directory, name, user)) is not None and has_ended(record):
                ended.append(name)
    # A server writes its record after it has mounted, so the mount table must be read last: a
    # record whose mount is missing in this table belongs to a mount that is gone.
    mounted = {entry.device for entry in read_mounts()}
    for name in ended:
        if name.partition(".")[0] in mounted:
            continue
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_IMODE(status.st_mode) != _ENDED_MODE:
                os.chmod(name, _ENDED_MODE, dir_fd=directory)
            elif time.time() - status.st_ctime >= _MIN_ENDED_SECONDS:
                remove_socket(directory, name)
                os.unlink(name, dir_fd=directory)


def _remove_unfinished(directory: int, name: str) -> None:
    """Remove a record's temporary file or its socket, unless the server may still be running."""
    pid = name.removesuffix(_NEW_SUFFIX).removesuffix(STATISTICS_SUFFIX).rpartition(".")[2]
    if re.fullmatch("[0-9]{1,10}", pid) and process_start(int(pid)) is None:
        os.unlink(name, dir_fd=directory)
