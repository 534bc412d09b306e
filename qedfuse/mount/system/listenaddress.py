"""The address of the option ``metrics``: a port on loopback, or a socket in the file system."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from qedfuse.errors import HostError, UsageError
from qedfuse.mount.system.statisticssocket import listen, listen_at
from qedfuse.text import printable

_UNIX: Final = "unix:"
_LOOPBACK: Final = re.compile(
    r"(?:(localhost|127(?:\.(?:25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})){3}|\[::1\]):)?([0-9]{1,5})"
)
_EXPECTED: Final = "a port, 127.0.0.1:PORT, [::1]:PORT or unix:PATH"
_MAX_PORT: Final = 65535
_MAX_NAME_BYTES: Final = 107 - len("/proc/self/fd/2147483647/")
"""Maximum length of a socket's file name.  The address of a socket has at most 107 bytes, and names
the directory by its descriptor, as in ``/proc/self/fd/9/NAME``."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a server listens.

    Attributes:
        host: An address of the loopback interface; empty for a socket in the file system.
        port: The TCP port; 0 for a socket in the file system.
        path: The path of the socket; empty for TCP.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, name: str, value: str) -> Self:
        """Parse the value of the option ``name``.

        Raises:
            UsageError: The value is not a valid address, the file name of the socket is not valid,
                or other machines could reach the address.
        """
        path = value.removeprefix(_UNIX)
        if value.startswith(_UNIX) and path:
            file_name = os.path.basename(path)  # noqa: PTH119
            if file_name in {"", ".", ".."}:
                msg = (
                    f"option {name}: found {printable(value)}, a directory, expected the path of "
                    "a socket"
                )
                raise UsageError(msg)
            length = len(os.fsencode(file_name))
            if length > _MAX_NAME_BYTES:
                msg = (
                    f"option {name}: found the name of a socket of {length} bytes, "
                    f"expected at most {_MAX_NAME_BYTES} bytes"
                )
                raise UsageError(msg)
            return cls(path=path)
        found = _LOOPBACK.fullmatch(value)
        if found is None or not 0 < int(found[2]) <= _MAX_PORT:
            msg = f"option {name}: found {printable(value)}, expected {_EXPECTED}"
            raise UsageError(msg)
        host = (found[1] or "127.0.0.1").strip("[]")
        return cls("127.0.0.1" if host == "localhost" else host, int(found[2]))

    def absolute(self) -> ListenAddress:
        """Return the address with its path made absolute; a TCP address is unchanged."""
        return replace(self, path=str(Path(self.path).absolute())) if self.path else self

    def __str__(self) -> str:
        """Return the address for messages."""
        if self.path:
            return printable(_UNIX + self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Listener:
    """A listening socket, and its directory if it is in the file system.

    Attributes:
        socket: The socket, in non-blocking mode.
    """

    def __init__(self, address: ListenAddress) -> None:
        """Listen on ``address``; its path, if any, must be absolute.

        This must happen before the mount, because later the path may lead through the mount.  A
        socket that a killed process has left at the path is replaced.

        Raises:
            HostError: A system call failed, another process uses the address, or a file at the path
                is not a socket.
        """
        self._directory = -1
        self._status: os.stat_result | None = None  # of the socket's file
        self._name = os.path.basename(address.path)  # noqa: PTH119
        try:
            self.socket = self._listen_at_path(address.path) if address.path else _listen(address)
        except OSError as error:
            self._close_directory()
            name = f"option metrics: {address}"
            raise HostError.from_os(error, name, "cannot listen") from error

    def _listen_at_path(self, path: str) -> socket.socket:
        """Listen at a path; only this user and root can connect."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._directory = os.open(os.path.dirname(path), flags)  # noqa: PTH120
        self._remove_stale()
        made = listen(self._directory, self._name)
        with suppress(OSError):  # another program has removed the socket
            self._status = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        return made

    def _remove_stale(self) -> None:
        """Remove a socket on which no process listens, if there is one; refuse any other file."""
        try:
            # While the file is open, no new socket gets its inode number.
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._name, flags, dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISSOCK(status.st_mode):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            if _is_in_use(fd):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            # Another process may have replaced the socket meanwhile.  Then bind(2) fails.
            self._remove(status)
        finally:
            os.close(fd)

    def _remove(self, status: os.stat_result) -> None:
        """Remove the socket at the path if it still is the file with ``status``."""
        with suppress(FileNotFoundError):
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
            if os.path.samestat(found, status):
                os.unlink(self._name, dir_fd=self._directory)

    @property
    def directory(self) -> int | None:
        """The descriptor of the directory of a socket in the file system; None for TCP."""
        return self._directory if self._directory >= 0 else None

    def close(self) -> None:
        """Close the socket, and remove its file, unless another file has replaced it."""
        if self._status is not None:
            with suppress(OSError):  # the directory was made read-only, for example
                # While the socket is open, no other file gets its inode number.
                self._remove(self._status)
        self.socket.close()
        self._close_directory()

    def _close_directory(self) -> None:
        """Close the directory of the socket, if it is open."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _is_in_use(fd: int) -> bool:
    """Return whether a process listens on the socket file that the descriptor ``fd`` refers to."""
    with socket.socket(socket.AF_UNIX) as client:
        # A blocking connect(2) would wait for a stopped process whose backlog is full.
        client.setblocking(False)  # noqa: FBT003  its only parameter
        try:
            client.connect(f"/proc/self/fd/{fd}")
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
    return True


def _listen(address: ListenAddress) -> socket.socket:
    """Listen on a TCP port of the loopback interface."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET

    def prepare(made: socket.socket) -> None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    return listen_at(family, (address.host, address.port), prepare)
