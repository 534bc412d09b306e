"""Remote files of the tests: their content, how they are opened, and objects that can be held."""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions, Version
from qedfuse.remote.fetcher import Fetcher
from qedfuse.remote.object import make_client, open_object
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unitfile import UNIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer

DEADLINES: Final = Deadlines(connect_seconds=1.0, attempt_seconds=0.8, total_seconds=2.0)
"""Deadlines for servers with faults."""
MAX_SECONDS: Final = DEADLINES.total_seconds + 2 * DEADLINES.attempt_seconds + 30.0
"""After this time a read with these deadlines must have ended, on a machine that is busy.  With the
usual deadlines the read would take longer."""
PATIENT: Final = Deadlines(connect_seconds=10.0, attempt_seconds=20.0, total_seconds=60.0)
"""Deadlines for servers that answer well, so that a busy machine causes no second attempt."""


def some_bytes(units: float, seed: int = 1) -> bytes:
    """Return random content of a number of units, which may be broken."""
    return random.Random(seed).randbytes(int(units * UNIT_BYTES))


@contextmanager
def opened(
    url: str,
    cache: Path | None,
    *,
    cache_bytes: int | None = None,
    allow_unpinned: bool = False,
    deadlines: Deadlines = PATIENT,
) -> Iterator[RemoteFile]:
    """Open a URL for the block; without a directory of a cache nothing is kept on disk."""
    address = parse_address(url)
    if cache is None:
        client = make_client(
            address, ClientOptions(deadlines.connect_seconds, deadlines.attempt_seconds)
        )
        source = open_object(address, client, deadlines)
        file = RemoteFile(source, Fetcher(source, None), None)
    else:
        remote = RemoteOptions(
            cache_directory=str(cache),
            cache_bytes=cache_bytes,
            deadlines=deadlines,
            allow_unpinned=allow_unpinned,
        )
        file = open_remote(address, remote)
    try:
        yield file
    finally:
        file.close()


def read(file: RemoteFile, offset: int, length: int) -> bytes:
    """Read a range in this thread; fewer bytes only where the file ends."""
    buffer = bytearray(length)
    done = file.read_blocking(offset, memoryview(buffer))
    return bytes(buffer[:done])


def fetching_threads() -> list[threading.Thread]:
    """Return the threads of fetchers that are running."""
    return [thread for thread in threading.enumerate() if thread.name == "qedfuse-fetch"]


class HeldObject:
    """An object in memory whose requests a test holds, counts and fails.

    Attributes:
        requests: Offset and length of each request that has begun.
        brief_requests: How many of them were brief.
        held: The offsets of units of which requests wait for `release`.
        ignores_close: Whether held requests go on waiting after `close`.
        errors: For offsets of units, what requests for them raise.
    """

    attempt_seconds = 10.0
    max_seconds = 60.0
    max_brief_seconds = 10.0

    def __init__(self, content: bytes) -> None:
        """Serve ``content``."""
        self.content = content
        self.address = parse_address("http://127.0.0.1/held.qed")
        self.version = Version(len(content), '"held"')
        self.requests: list[tuple[int, int]] = []
        self.brief_requests = 0
        self.held: set[int] = set()
        self.errors: dict[int, BaseException] = {}
        self.is_closed = self.ignores_close = False
        self._condition = threading.Condition()

    def get_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        deliver: Callable[[Buffer], object],
        *,
        allocate: Callable[[int], Buffer] = bytearray,
        is_brief: bool = False,
    ) -> None:
        """Deliver the parts of a range, each once no unit of it is held."""
        with self._condition:
            self.requests.append((offset, sum(lengths)))
            self.brief_requests += is_brief
            self._condition.notify_all()
        for length in lengths:
            self._wait(set(range(offset // UNIT_BYTES, -(-(offset + length) // UNIT_BYTES))))
            part = memoryview(allocate(length))
            part[:] = self.content[offset : offset + length]
            deliver(part)
            offset += length

    def _wait(self, units: set[int]) -> None:
        """Wait until no unit is held; raise the error that a test has given for one of them."""
        with self._condition:
            while units & self.held and not self.is_closed:
                self._condition.wait()
        if self.is_closed:
            raise RemoteError(str(self.address))
        for unit in units:
            if unit in self.errors:
                raise self.errors.pop(unit)

    def units(self) -> list[list[int]]:
        """Return the units of each request that has begun."""
        with self._condition:
            return [
                list(range(offset // UNIT_BYTES, -(-(offset + length) // UNIT_BYTES)))
                for offset, length in self.requests
            ]

    def release(self, *, kept: Iterable[int] = ()) -> None:
        """Let all requests go on, except those for the units of ``kept``."""
        with self._condition:
            self.held = set(kept)
            self._condition.notify_all()

    def close(self) -> None:
        """Let requests that wait fail."""
        with self._condition:
            self.is_closed = not self.ignores_close
            self._condition.notify_all()
