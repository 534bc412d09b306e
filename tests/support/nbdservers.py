"""Real NBD servers of the tests: nbdkit and qemu-nbd, on a Unix socket or a port of loopback."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from tests.support.servers import free_ports, missing_programs, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_START_SECONDS: Final = 30.0


def why_no_server(program: str) -> str:
    """Return why a server cannot be started here; empty if it can."""
    return f"not installed: {program}" if missing_programs(program) else ""


@contextmanager
def serving_nbd(directory: Path, *command: str | Path) -> Iterator[Callable[[], socket.socket]]:
    """Run a server for the block; yield what connects to it.

    Args:
        directory: An existing directory for the socket ``socket`` and the log.
        command: The command without the option for the socket; nbdkit or qemu-nbd.
    """
    path = directory / "socket"
    path.unlink(missing_ok=True)
    place: list[str | Path] = ["-U", path] if command[0] == "nbdkit" else ["-k", path]
    connect = partial(connect_unix, path)
    with _serving(directory, connect, *command[:1], *place, *command[1:]):
        yield connect


@contextmanager
def serving_nbd_tcp(directory: Path, *command: str | Path) -> Iterator[int]:
    """Run a server for the block; yield its port of 127.0.0.1.

    Args:
        directory: An existing directory for the log.
        command: The command without the options for the address; nbdkit or qemu-nbd.
    """
    (port,) = free_ports(1)
    address = "-i" if command[0] == "nbdkit" else "-b"
    place = [address, "127.0.0.1", "-p", str(port)]
    connect = partial(socket.create_connection, ("127.0.0.1", port), _START_SECONDS)
    with _serving(directory, connect, *command[:1], *place, *command[1:]):
        yield port


@contextmanager
def _serving(
    directory: Path,
    connect: Callable[[], socket.socket],
    program: str | Path,
    *arguments: str | Path,
) -> Iterator[None]:
    """Run a server for the block, in the foreground and for several clients."""
    stay = "-f" if program == "nbdkit" else "--persistent"
    with (
        (directory / "nbd.log").open("wb") as log,
        running([str(word) for word in (program, stay, *arguments)], log, dict(os.environ)),
    ):
        wait_for(partial(_answers, connect), _START_SECONDS, directory)
        yield


def connect_unix(path: Path) -> socket.socket:
    """Return a socket that is connected to a server at ``path``."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _answers(connect: Callable[[], socket.socket]) -> bool:
    """Return whether a server greets."""
    try:
        with connect() as sock:
            return sock.recv(8) == b"NBDMAGIC"
    except OSError:
        return False
