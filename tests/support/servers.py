"""Helpers for real servers in tests: free ports, processes that end with the test, and waiting."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_STOP_SECONDS: Final = 10.0


def missing_programs(*names: str) -> list[str]:
    """Return those of some programs that are not installed."""
    path = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
    return [name for name in names if shutil.which(name, path=path) is None]


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that no program uses at present."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_listening(port: int) -> bool:
    """Return whether a program accepts connections on a port of loopback."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextmanager
def running(
    command: list[str], log: IO[bytes], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the block; the kernel ends it if the test process is killed."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(is_up: Callable[[], bool], seconds: float, directory: Path) -> None:
    """Wait until a server answers; otherwise fail with what it has logged in ``directory``."""
    end = time.monotonic() + seconds
    while not is_up():
        if time.monotonic() > end:
            logs = [
                f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}"
                for path in sorted(directory.glob("*.log"))
            ]
            raise AssertionError("the server did not start:\n" + "\n".join(logs))
        time.sleep(0.02)
