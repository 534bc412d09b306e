"""Telling others that the disk is ready: a pid file, and systemd's notification socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from qedfuse.errors import HostError
from qedfuse.util.text import printable


def notify_systemd(state: str) -> None:
    """Send a line such as ``READY=1`` to the service manager, if one waits for it.

    A manager that does not listen any more is no reason to fail.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # the way to write an abstract name, which begins with NUL
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notice,
    ):
        notice.connect(os.fsencode(address))
        notice.send(state.encode())


def write_pidfile(path: str) -> None:
    """Write our process number, as a line of its own.

    Raises:
        HostError: The file cannot be written.
    """
    try:
        Path(path).write_text(f"{os.getpid()}\n", encoding="ascii")
    except OSError as error:
        raise HostError.from_os(error, printable(path), "cannot write the pid file") from error


def remove_pidfile(path: str) -> None:
    """Remove the file, if it is still about us; a pipe in its place is left alone."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="ascii") as file:  # noqa: PTH123  a descriptor
            if stat.S_ISREG(os.fstat(fd).st_mode) and int(file.read(32)) == os.getpid():
                os.unlink(path)  # noqa: PTH108
