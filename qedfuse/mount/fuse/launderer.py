"""The launderer: a helper process that makes the kernel write back and drop pages of a disk.

The kernel writes back and drops pages after the notification FUSE_NOTIFY_INVAL_INODE, a write(2) to
the connection (``/dev/fuse``).  This write(2) returns only when the server has answered the
kernel's write requests for the pages.  Until then the process that called it cannot end, not even
by SIGKILL, and the connection cannot end either.  If the server itself called write(2) and were
then killed, it would never end, and the programs that use the disk would wait forever.

Therefore the launderer calls write(2), on a second descriptor of the connection.  When the server
has ended, the launderer answers the remaining requests of the kernel with errors until the write(2)
returns.  Then it ends, and the connection ends with it.

The files of the interpreter may lie under the mountpoint.  A program that started after mounting
could read these files, and wait for the server while the server waits for the program.  Therefore
the launderer is forked before the mount exists, and executes no program.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Final

from qedfuse.mount.process.helperprocess import HelperProcess
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import threading

# linux/fuse.h, a stable interface: the ioctl that connects another descriptor of /dev/fuse to
# the same mount, struct fuse_in_header (its first three fields) and struct fuse_out_header.
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500
_IN_HEADER: Final = struct.Struct("=IIQ")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_WITHOUT_REPLY: Final = (2, 36, 41, 42)
"""The operations that get no reply: FORGET, INTERRUPT, NOTIFY_REPLY and BATCH_FORGET."""

_MAX_REQUEST_BYTES: Final = 1 << 24
"""Size of the buffer for a request of the kernel; every request is shorter."""
_MAX_NOTIFICATION_BYTES: Final = 64
"""Size of the buffer for a notification; every notification is shorter."""
_WORKER_CHECK_MILLISECONDS: Final = 20
"""Maximum time between two checks whether the worker thread has ended."""
ANSWER: Final = struct.Struct("=i")
"""An answer of the launderer: the errno of its write(2) to the kernel; 0 if write(2) succeeded."""


class Launderer(HelperProcess):
    """The launderer as the server sees it: a child process and a socket to it.

    The first message is one byte with the descriptor of the connection to the kernel (SCM_RIGHTS),
    and gets no answer.  Each further message is one notification, which is answered with an
    `ANSWER`.  The server must wait for the answer before it sends the next notification.
    """

    def __init__(self) -> None:
        """Fork the launderer, as `HelperProcess` does.

        Raises:
            OSError: The host refuses a socket pair or a process.
        """
        super().__init__(_serve)


def _serve(commands: socket.socket) -> None:
    """Pass the server's notifications to the kernel until the server closes its socket.

    If a write(2) is still waiting then, the kernel's requests are answered with errors.
    """
    _byte, received, _flags, _address = socket.recv_fds(commands, 1, 1)
    if not received:
        return
    (connection,) = received
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _FUSE_DEV_IOC_CLONE, struct.pack("=I", connection))
    os.close(connection)
    worker = start_thread(_send_notifications, device, commands)
    end = select.poll()
    end.register(commands, 0)  # no events, so poll(2) waits only for the close (POLLHUP)
    end.poll()
    _fail_requests(device, worker)


def _send_notifications(device: int, commands: socket.socket) -> None:
    """Write notifications to the kernel, one at a time; return when the socket is closed."""
    while message := commands.recv(_MAX_NOTIFICATION_BYTES):
        error_number = 0
        try:
            os.write(device, message)
        except OSError as error:
            error_number = error.errno or errno.EIO
        try:
            commands.send(ANSWER.pack(error_number))
        except OSError:
            return


def _fail_requests(device: int, worker: threading.Thread) -> None:
    """Answer requests of the kernel with ECONNABORTED until the worker thread has ended.

    The server must have closed the socket.  Otherwise the thread would wait for a notification, and
    requests that the server can answer would fail meanwhile.
    """
    ready = select.poll()
    ready.register(device, select.POLLIN)
    while worker.is_alive():
        ready.poll(_WORKER_CHECK_MILLISECONDS)
        try:
            request = os.read(device, _MAX_REQUEST_BYTES)
            _length, operation, request_id = _IN_HEADER.unpack_from(request)
            if operation not in _WITHOUT_REPLY:
                reply = _OUT_HEADER.pack(_OUT_HEADER.size, -errno.ECONNABORTED, request_id)
                os.write(device, reply)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:  # the connection has ended, so the write(2) returns
                worker.join()
