"""Some machines of a fleet, each a thread with a cache of its own; `benchmarks.fleet` starts it.

    python -m benchmarks.fleetmachine URL RAW CACHES NUMBER

It prints ``ready``, waits for a line, reads, compares each byte with the file RAW, and prints what
was wrong.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import qedfuse
from benchmarks.fleetload import boot_reads
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import QedError
from qedfuse.remote.options import Deadlines, RemoteOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEADLINES: Final = Deadlines(connect_seconds=60, attempt_seconds=120, total_seconds=600)
"""Long enough for servers that share a processor with the fleet: a second attempt would count."""


def boot(url: str, content: bytes, cache: str) -> str:
    """Read what a boot reads; return what was wrong, or an empty text."""
    remote = RemoteOptions(cache_directory=cache, deadlines=_DEADLINES, allow_http=True)
    try:
        with qedfuse.open(url, options=OpenOptions(remote=remote)) as disk:
            for offset, length in boot_reads(len(content)):
                disk.seek(offset)
                if disk.read(length) != content[offset : offset + length]:
                    return f"wrong bytes at {offset}"
    except QedError as error:
        return str(error)
    return ""


def main(words: Sequence[str]) -> int:
    """Boot all machines at the same moment; print the first failure."""
    url, raw, caches, number = words
    content = Path(raw).read_bytes()
    with ThreadPoolExecutor(int(number)) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        found = list(
            pool.map(lambda each: boot(url, content, f"{caches}-{each}"), range(int(number)))
        )
    failures = [text for text in found if text]
    print(*failures[:1])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
