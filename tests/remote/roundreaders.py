"""Processes that read through the cache of `tests.remote.rounds`, and compare what they read.

    python -m tests.remote.roundreaders read|follow URL CACHE NUMBER

The exit code is 1 if a byte was wrong.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import select
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import RemoteError
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.remotes import DEADLINES, opened, read, some_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS: Final = 5.5
"""How many units the object has."""


@contextmanager
def disk_lock(cache: str | Path, operation: int) -> Iterator[None]:
    """Hold a lock beside a cache: shared by readers (LOCK_SH), or exclusive (LOCK_EX).

    While the disk loses data, no process is between a check of what it reads and the read itself.
    LocalData (remote/localdata.py) says what may happen in this short time.  Who waits for the
    lock holds the gate, so readers that come later do not overtake.
    """
    path = Path(cache)
    with (
        path.with_name("gate").open("ab") as gate,
        path.with_name("disk-lock").open("ab") as lock,
    ):
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, operation)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def read_all(url: str, cache: str, number: int) -> int:
    """Read and compare a whole object; return the exit code: 1 if a byte is wrong."""
    content = some_bytes(UNITS, seed=number)
    with opened(url, Path(cache)) as file:
        for offset in range(0, len(content), UNIT_BYTES):
            if read(file, offset, UNIT_BYTES) != content[offset : offset + UNIT_BYTES]:
                return 1
            print(offset, flush=True)  # noqa: T201  output of a script
    return 0


def follow(url: str, cache: str, number: int) -> int:
    """Read and compare until the input ends; return the exit code: 1 if a byte is wrong."""
    content = some_bytes(UNITS, seed=number)
    units = [content[at : at + UNIT_BYTES] for at in range(0, len(content), UNIT_BYTES)]
    chance = random.Random(os.getpid())
    view = memoryview(bytearray(UNIT_BYTES))
    with opened(url, Path(cache), deadlines=DEADLINES) as file:
        print("open", flush=True)  # noqa: T201  output of a script
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(50):
                # Whole units, so that one process misses all that another one reads.
                offset = chance.randrange(len(units)) * UNIT_BYTES
                expected = units[offset // UNIT_BYTES]
                part = view[: len(expected)]
                with disk_lock(cache, fcntl.LOCK_SH):
                    if file.try_read(offset, part):
                        if part != expected:
                            return 1
                    elif chance.random() < 0.5:
                        with suppress(RemoteError):
                            if read(file, offset, len(part)) != expected:
                                return 1
    return 0


def main() -> int:
    """Run the process that the command line asks for; return the exit code."""
    logging.disable()
    name, url, cache, number = sys.argv[1:]
    return (read_all if name == "read" else follow)(url, cache, int(number))


if __name__ == "__main__":
    sys.exit(main())
