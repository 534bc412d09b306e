"""The helper process that has the kernel write back and drop pages of a disk.

The notification that asks for this (FUSE_NOTIFY_INVAL_INODE) is a write(2) that returns when
the server has taken the writes.  Until then the process that made it cannot end, not even by
SIGKILL, and the connection does not end either.  So if the server sent it and was killed
meanwhile, the server would never end, and the users of the disk would wait forever.

Therefore this process sends it, over a second descriptor of the connection.  When the server
has ended, this process answers the remaining requests of the kernel with errors until the
write(2) returns.  Then it ends, and the connection ends with it.

It is forked before the mount exists, and executes no program.  The files of the interpreter
may lie under the mountpoint: a server that started a program after mounting could wait for a
reply of its own.  Until the process gets the connection it only sleeps.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from qedfuse.util.descriptors import (
    STANDARD,
    close_descriptors,
    discard_standard_streams,
    open_descriptors,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# linux/fuse.h, a stable interface
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500
_IN_HEADER: Final = struct.Struct("=IIQ")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_WITHOUT_REPLY: Final = (2, 36, 41, 42)
"""The requests without a reply: FORGET, INTERRUPT, NOTIFY_REPLY and BATCH_FORGET."""

_MAX_REQUEST_BYTES: Final = 1 << 24
_MAX_NOTIFICATION_BYTES: Final = 64
_WORKER_CHECK_MILLISECONDS: Final = 20
_MAX_END_MILLISECONDS: Final = 5000

ERROR: Final = struct.Struct("=i")
"""An answer of the process: an errno, or 0."""


class Launderer:
    """The server's end of the helper process.

    The server sends one notification for the kernel at a time through the socket, and the
    process answers each with an errno (`ERROR`).  The first message is any byte together with
    the descriptor of the connection (SCM_RIGHTS).

    Attributes:
        socket: The server's end of the socket pair.
        pid: The process.
    """

    def __init__(self) -> None:
        """Fork the process; call this before there is a second thread.

        Raises:
            OSError: The host refuses a socket pair or a process.
        """
        self.socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child_end:
            try:
                self.pid = os.fork()
            except OSError:
                self.socket.close()
                raise
            if self.pid == 0:
                _be_child(child_end)

    def __enter__(self) -> Self:
        """Do nothing: the constructor has started the process."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Stop the process and wait for its end."""
        self.stop()
        self.wait()

    def stop(self) -> None:
        """Have the process end, by closing the server's end of the socket pair."""
        self.socket.close()

    def wait(self) -> bool:
        """Wait for the end of the process; return False if it lasts more than 5 seconds."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has been waited for already
            return True
        try:
            end = select.poll()
            end.register(process, select.POLLIN)
            if not end.poll(_MAX_END_MILLISECONDS):
                return False
        finally:
            os.close(process)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        return True


def _be_child(commands: socket.socket) -> NoReturn:
    """Run the helper process; never returns, since the caller's code belongs to the server."""
    try:
        # Signals of the terminal are meant for the server; this process ends after it.
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # Locks, pipes and the terminal of the server must be released when the server ends.
        os.chdir("/")
        discard_standard_streams()
        close_descriptors(open_descriptors() - {*STANDARD, commands.fileno()})
        _serve(commands)
    finally:
        os._exit(0)


def _serve(commands: socket.socket) -> None:
    """Send notifications until the server's end of the socket pair is closed."""
    _byte, received, _flags, _address = socket.recv_fds(commands, 1, 1)
    if not received:  # the session has ended and has never sent a notification
        return
    (connection,) = received
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _FUSE_DEV_IOC_CLONE, struct.pack("=I", connection))
    os.close(connection)
    worker = threading.Thread(target=_send_notifications, args=(device, commands), daemon=True)
    worker.start()
    end = select.poll()
    end.register(commands, 0)
    end.poll()
    _fail_requests(device, worker)


def _send_notifications(device: int, commands: socket.socket) -> None:
    """Write notifications to the kernel, one after the other, and answer each with an errno."""
    while message := commands.recv(_MAX_NOTIFICATION_BYTES):
        number = 0
        try:
            os.write(device, message)
        except OSError as error:
            number = error.errno or errno.EIO
        try:
            commands.send(ERROR.pack(number))
        except OSError:
            return


def _fail_requests(device: int, worker: threading.Thread) -> None:
    """Answer requests of the kernel with ECONNABORTED until the worker's write(2) returns."""
    ready = select.poll()
    ready.register(device, select.POLLIN)
    while worker.is_alive():
        ready.poll(_WORKER_CHECK_MILLISECONDS)
        try:
            request = os.read(device, _MAX_REQUEST_BYTES)
            _length, operation, number = _IN_HEADER.unpack_from(request)
            if operation not in _WITHOUT_REPLY:
                os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.ECONNABORTED, number))
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:  # the connection has ended by itself
                worker.join()
