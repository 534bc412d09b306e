"""The process that has the kernel write back what it keeps to itself; a script of its own.

That request to the kernel returns when the server has taken the writes, and until then
nothing can end whoever made it, not even SIGKILL.  Nor does the connection end while it is
under way.  So a server that asked on its own and was killed meanwhile would never be gone,
and its users would wait for ever.

Here the asking is done over a second descriptor of the connection.  When the server has
gone, this process answers what the kernel still wants of it, with errors, until the request
returns; then it ends, and the connection with it.

It imports nothing of the package, so that it starts in a few milliseconds.  The first
argument is the descriptor of the connection; standard input is a socket on which each
message is one for the kernel, answered with an error number.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import threading
from typing import Final

# linux/fuse.h, a stable interface
_CLONE: Final = 0x8004E500
_IN_HEADER: Final = struct.Struct("=IIQ")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_UNANSWERED: Final = (2, 36, 41, 42)
"""FORGET, INTERRUPT, NOTIFY_REPLY and BATCH_FORGET."""

_LARGEST: Final = 1 << 24
_MILLISECONDS: Final = 20

ERROR: Final = struct.Struct("=i")


def main() -> None:
    """Work until the other end of standard input is closed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server's end is the end of this
    connection, commands = int(sys.argv[1]), socket.socket(fileno=0)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _CLONE, struct.pack("=I", connection))
    # What the server holds must end with the server.
    os.close(connection)
    worker = threading.Thread(target=_work, args=(device, commands), daemon=True)
    worker.start()
    end = select.poll()
    end.register(commands, 0)
    end.poll()
    _stand_in(device, worker)


def _work(device: int, commands: socket.socket) -> None:
    """Pass messages on to the kernel, one after the other."""
    while message := commands.recv(64):
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
        ready.poll(_MILLISECONDS)
        try:
            request = os.read(device, _LARGEST)
            _length, operation, number = _IN_HEADER.unpack_from(request)
            if operation not in _UNANSWERED:
                os.write(device, _OUT_HEADER.pack(_OUT_HEADER.size, -errno.ECONNABORTED, number))
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.ENODEV:  # the connection has ended by itself
                worker.join()


if __name__ == "__main__":
    main()
