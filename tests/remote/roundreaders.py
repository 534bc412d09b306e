"""Processes that read through the cache of `tests.remote.rounds`, and compare what they read.

    python -m tests.remote.roundreaders read|follow URL CACHE NUMBER

The exit code is 1 if a byte was wrong.
"""

from __future__ import annotations

import logging
import os
import random
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from qedfuse.errors import RemoteError
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.remotes import DEADLINES, opened, read, some_bytes

UNITS: Final = 5.5
"""How many units the object has."""


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
    """Read and compare until the input ends; return the exit code: 1 if a byte is wrong.

    A byte of the input makes this process pause: it prints a line, and waits for another byte.
    """
    content = some_bytes(UNITS, seed=number)
    units = [content[at : at + UNIT_BYTES] for at in range(0, len(content), UNIT_BYTES)]
    chance = random.Random(os.getpid())
    view = memoryview(bytearray(UNIT_BYTES))
    with opened(url, Path(cache), deadlines=DEADLINES) as file:
        print("open", flush=True)  # noqa: T201  output of a script
        while True:
            if select.select([sys.stdin], [], [], 0)[0]:
                if not os.read(sys.stdin.fileno(), 1):
                    return 0
                print("paused", flush=True)  # noqa: T201  output of a script
                os.read(sys.stdin.fileno(), 1)
            for _ in range(50):
                # Whole units, so that one process misses all that another one reads.
                offset = chance.randrange(len(units)) * UNIT_BYTES
                expected = units[offset // UNIT_BYTES]
                part = view[: len(expected)]
                if file.try_read(offset, part):
                    if part != expected:
                        return 1
                elif chance.random() < 0.5:
                    with suppress(RemoteError):
                        if read(file, offset, len(part)) != expected:
                            return 1


def main() -> int:
    """Run the process that the command line asks for; return the exit code."""
    logging.disable()
    name, url, cache, number = sys.argv[1:]
    return (read_all if name == "read" else follow)(url, cache, int(number))


if __name__ == "__main__":
    sys.exit(main())
