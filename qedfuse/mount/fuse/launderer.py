"""The process that has the kernel write back what it keeps to itself.

That request to the kernel returns when the server has taken the writes, and until then
nothing can end whoever made it, not even SIGKILL.  Nor does the connection end while it is
under way.  So a server that asked on its own and was killed meanwhile would never be gone,
and its users would wait for ever.

Here the asking is done over a second descriptor of the connection.  When the server has
gone, this process answers what the kernel still wants of it, with errors, until the request
returns; then it ends, and the connection with it.

It is forked before the mount exists, and executes no program.  The files of the interpreter
may lie under the mountpoint: a server that started a program after mounting could wait for
an answer of its own.  Until it gets the connection it only sleeps.
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
_CLONE: Final = 0x8004E500
_IN_HEADER: Final = struct.Struct("=IIQ")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_UNANSWERED: Final = (2, 36, 41, 42)
"""FORGET, INTERRUPT, NOTIFY_REPLY and BATCH_FORGET."""

_LARGEST_REQUEST_BYTES: Final = 1 << 24
_LARGEST_MESSAGE_BYTES: Final = 64
_STAND_IN_MILLISECONDS: Final = 20
_END_MILLISECONDS: Final = 5000

ERROR: Final = struct.Struct("=i")


class Launderer:
    """The server's side of the process.

    The socket takes one message for the kernel at a time, and answers it with an error
    number (`ERROR`).  The first message is any byte, together with the descriptor of the
    connection.

    Attributes:
        socket: The way to the process.
        pid: The process.
    """

    def __init__(self) -> None:
        """Fork the process; call it before there is a second thread.

        Raises:
            OSError: The host refuses.
        """
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.pid = os.fork()
            except OSError:
                self.socket.close()
                raise
            if self.pid == 0:
                _be_child(theirs)

    def __enter__(self) -> Self:
        """Do nothing: it has been started."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """See the process end."""
        self.stop()
        self.wait()

    def stop(self) -> None:
        """Tell the process to end."""
        self.socket.close()

    def wait(self) -> bool:
        """Wait for the end of the process, some seconds at most; tell whether it has ended."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has been waited for
            return True
        try:
            end = select.poll()
            end.register(process, select.POLLIN)
            if not end.poll(_END_MILLISECONDS):
                return False
        finally:
            os.close(process)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        return True


def _be_child(commands: socket.socket) -> NoReturn:
    """Work and exit; never returns, since the caller's code belongs to the server."""
    try:
        # A Ctrl-C is for the server, and the server's end is the end of this.
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # What the server holds must end with the server: locks, pipes, the terminal.
        os.chdir("/")
        discard_standard_streams()
        close_descriptors(open_descriptors() - {*STANDARD, commands.fileno()})
        _serve(commands)
    finally:
        os._exit(0)


def _serve(commands: socket.socket) -> None:
    """Work until the other end of ``commands`` is closed."""
    _byte, received, _flags, _address = socket.recv_fds(commands, 1, 1)
    if not received:  # the session has ended without ever needing this
        return
    (connection,) = received
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _CLONE, struct.pack("=I", connection))
    os.close(connection)
    worker = threading.Thread(target=_work, args=(device, commands), daemon=True)
    worker.start()
    end = select.poll()
    end.register(commands, 0)
    end.poll()
    _stand_in(device, worker)


def _work(device: int, commands: socket.socket) -> None:
    """Pass messages on to the kernel, one after the other."""
    while message := commands.recv(_LARGEST_MESSAGE_BYTES):
        number = 0
        try:
            os.write(device, message)
        except OSError as error:
            number = error.errno or errno.EIO
        try:
            commands.send(ERROR.pack(number))
        except OSError:
            return


def _stand_in(device: int, worker: threading.Thread) -> None:
    """Answer in place of the server while the worker is stuck."""
    ready = select.poll()
    ready.register(device, select.POLLIN)
    while worker.is_alive():
        ready.poll(_STAND_IN_MILLISECONDS)
        try:
            request = os.read(device, _LARGEST_REQUEST_BYTES)
            _length, operation, number = _IN_HEADER.unpack_from(request)
            if operation not in _UNANSWERED:
                os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.ECONNABORTED, number))
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:  # the connection has ended by itself
                worker.join()
