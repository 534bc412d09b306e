"""The unmounter: a helper process that unmounts for a server in a sandbox.

A process under Landlock can neither mount nor unmount, and no_new_privs takes the privilege of
fusermount3 away.  So a server in a sandbox asks the unmounter, which was forked earlier.  The
unmounter unmounts only the mountpoint that it got when it was forked.

The unmounter also makes the server's connections to the log daemon, for example after a restart of
the daemon, and passes them to the server.  If the sandbox permitted the server to connect, it could
connect to every Unix socket of the host, because neither Landlock nor seccomp can permit single
paths of sockets.

Each request has a process of its own: an ordinary unmount may wait until the server has answered
the kernel's requests, and a request to detach the mount must not wait for that unmount.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.errors import FuseError, HostError, MountpointError, PrivilegeError, QedError
from qedfuse.mount.process.helperprocess import HelperProcess
from qedfuse.mount.process.logsinks import SystemLogHandler
from qedfuse.mount.system.unmount import BusyError, unmount
from qedfuse.mount.system.visiblemounts import describe_visible_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    import logging

_UNMOUNT, _DETACH, _DESCRIBE, _CONNECT = b"u", b"l", b"d", b"c"
"""The requests: unmount, detach (``lazy``), describe the visible mounts, connect to the log."""
_MAX_MESSAGE_BYTES: Final = 64 << 10
"""Maximum size of a request and of a reply."""
_ERRORS: Final = (BusyError, PrivilegeError, FuseError, MountpointError, HostError)
"""The errors that a reply can stand for; any other error becomes a `HostError`."""


class Unmounter(Protocol):
    """Unmounts one mountpoint.  Several threads may call the methods concurrently."""

    def connect_system_log(self) -> None:
        """Make the handler of the system log connect in a way that works in a sandbox.

        Call this after the server has entered its sandbox.
        """

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount the mountpoint.

        Args:
            lazy: Whether to detach the mount even if it is in use.

        Raises:
            QedError: The mount cannot be unmounted, as in `qedfuse.mount.system.unmount.unmount`.
            HostError: The helper process cannot be asked, or does not reply.
        """

    def describe_visible_mounts(self, device: str) -> str | None:
        """Describe the visible mounts of a file system; None if there are none.

        Args:
            device: The device number of the file system, ``MAJOR:MINOR``.

        Raises:
            HostError: The mounts cannot be found, or the helper process cannot be asked, or does
                not reply.
        """


class HelperUnmounter(HelperProcess):
    """The helper process as the server sees it; an `Unmounter`."""

    def __init__(self, mountpoint: str, log: logging.Handler | None) -> None:
        """Fork the unmounter, as `HelperProcess` does.

        Args:
            mountpoint: The path that is unmounted, absolute and free of symbolic links.
            log: The handler of the server's log; None for stderr.

        Raises:
            OSError: The host refuses a socket pair or a process.
        """
        self._mountpoint = mountpoint
        self._system_log = log if isinstance(log, SystemLogHandler) else None
        kept = () if self._system_log is None else (self._system_log.directory,)
        super().__init__(partial(_serve, mountpoint, self._system_log), kept)

    def connect_system_log(self) -> None:
        """Make the handler of the system log connect through the unmounter from now on."""
        if self._system_log is not None:
            self._system_log.connect_through(self._connect_to_log_daemon)

    def _connect_to_log_daemon(self) -> socket.socket:
        """Return what `SystemLogHandler.connect` returns; raise OSError if that is not possible."""
        try:
            _text, descriptors = self._ask(_CONNECT)
        except QedError as error:
            raise OSError(errno.ECONNREFUSED, str(error)) from error
        if not descriptors:  # the kernel drops a descriptor if this process can open no more
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return socket.socket(fileno=descriptors[0])

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount the mountpoint; the errors are those of `Unmounter.unmount`."""
        self._ask(_DETACH if lazy else _UNMOUNT)

    def describe_visible_mounts(self, device: str) -> str | None:
        """Do what `Unmounter.describe_visible_mounts` does, in the helper process."""
        text, _descriptors = self._ask(_DESCRIBE + device.encode())
        return text

    def _ask(self, request: bytes) -> tuple[str | None, list[int]]:
        """Send a request and wait for its reply; return the text and the descriptors of the reply.

        Raises:
            QedError: The reply is an error, or the unmounter has failed.
        """
        try:
            own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with own:
                with other:
                    socket.send_fds(self.socket, [request], [other.fileno()])
                reply, descriptors, _flags, _address = socket.recv_fds(own, _MAX_MESSAGE_BYTES, 1)
        except OSError as error:
            raise self._ended(error.strerror) from error
        if not reply:
            raise self._ended(os.strerror(errno.EPIPE))
        name, text = json.loads(reply)
        for kind in _ERRORS:
            if name == kind.__name__:
                raise kind(text)
        return None if text is None else str(text), descriptors

    def _ended(self, reason: str | None) -> HostError:
        """Return the error for an unmounter that cannot be asked, or gives no reply."""
        shown = printable(self._mountpoint)
        msg = f"{shown}: no reply from the unmounter (a helper process): {reason}"
        return HostError(msg)


def _serve(mountpoint: str, system_log: SystemLogHandler | None, commands: socket.socket) -> None:
    """Start a process for each request, until the server closes its socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets processes that have ended
    while True:
        request, received, _flags, _address = socket.recv_fds(commands, _MAX_MESSAGE_BYTES, 1)
        if not request:
            return
        if not received:
            # The kernel has dropped the descriptor, because this process could open no more.  That
            # has closed the socket, so `_ask` raises.
            continue
        # If the fork fails, the descriptor is closed without a reply, and `_ask` raises.
        with suppress(OSError):
            if os.fork() == 0:
                _answer(mountpoint, system_log, request, received[0])
        os.close(received[0])


def _answer(
    mountpoint: str, system_log: SystemLogHandler | None, request: bytes, reply: int
) -> None:
    """Carry out a request, send the reply, and exit; the call never returns.

    A reply is a JSON list of two items.  For an error these are the name of its class and its
    message.  Otherwise they are null and the result, which is null except for `_DESCRIBE`.  The
    reply to `_CONNECT` also carries a descriptor.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # so that `unmount` can wait for fusermount3
        text = name = None
        descriptors = []
        try:
            if request == _CONNECT and system_log is not None:
                descriptors.append(system_log.connect().detach())
            elif request[:1] == _DESCRIBE:
                text = describe_visible_mounts(request[1:].decode())
            elif request in (_UNMOUNT, _DETACH):
                unmount(mountpoint, lazy=request == _DETACH)
            else:
                text, name = "the unmounter cannot carry out the request", HostError.__name__
        except (QedError, OSError) as error:
            text = str(error)
            name = next((kind.__name__ for kind in _ERRORS if type(error) is kind), "HostError")
        with socket.socket(fileno=reply) as connection:
            socket.send_fds(connection, [json.dumps([name, text]).encode()], descriptors)
    finally:
        os._exit(0)


class DirectUnmounter:
    """An `Unmounter` that works in this process, which must not be in a sandbox."""

    def __init__(self, mountpoint: str) -> None:
        """Prepare to unmount ``mountpoint``, which is absolute and free of symbolic links."""
        self._mountpoint = mountpoint

    def connect_system_log(self) -> None:
        """Do nothing: this process can connect to the log daemon itself."""

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount the mountpoint; the errors are those of `Unmounter.unmount`."""
        unmount(self._mountpoint, lazy=lazy)

    def describe_visible_mounts(self, device: str) -> str | None:
        """Do what `Unmounter.describe_visible_mounts` does, in this process."""
        return describe_visible_mounts(device)
