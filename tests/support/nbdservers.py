"""Real NBD servers of the tests: nbdkit and qemu-nbd, each on a socket in a directory."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from tests.support.servers import missing_programs, running, wait_for

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
    program, *arguments = [str(word) for word in command]
    place = ["-f", "-U", str(path)] if program == "nbdkit" else ["--persistent", "-k", str(path)]
    with (
        (directory / "nbd.log").open("wb") as log,
        running([program, *place, *arguments], log, dict(os.environ)),
    ):
        connect = partial(connect_unix, path)
        wait_for(partial(_answers, connect), _START_SECONDS, directory)
        yield connect


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
