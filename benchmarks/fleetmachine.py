"""Some machines of a fleet, each a thread with its own cache, in a process of `benchmarks.fleet`.

    python -m benchmarks.fleetmachine URL RAW CACHES NUMBER

The process prints ``ready``, waits for a line, reads, and compares each byte with the file RAW.
Then it prints ``read``, waits for a line, ends the machines, and prints what was wrong.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
"""So long that no request needs a second attempt, which the server would count as well, although
servers and fleet share a processor."""


class Machines:
    """Machines that end together.

    If a machine ended earlier, units that are still fetched ahead of its reader would be missing in
    the counts.

    Attributes:
        may_end: Set when the machines may end.
    """

    def __init__(self, url: str, content: bytes, number: int) -> None:
        """Describe machines that read ``url``, an image of a disk with ``content``."""
        self.may_end = threading.Event()
        self._url = url
        self._content = content
        self._have_read = threading.Barrier(number + 1)

    def boot(self, cache: str) -> str:
        """Run one machine; return what was wrong, or an empty text."""
        remote = RemoteOptions(cache_directory=cache, deadlines=_DEADLINES, allow_http=True)
        failure = ""
        try:
            with qedfuse.open(self._url, options=OpenOptions(remote=remote)) as disk:
                failure = self._read(disk)
                self._have_read.wait()
                self.may_end.wait()
        except QedError as error:
            self._have_read.abort()
            return str(error)
        except threading.BrokenBarrierError:
            return ""  # another machine has a failure
        return failure

    def wait_until_read(self) -> None:
        """Wait until all machines have read, or one has a failure."""
        with suppress(threading.BrokenBarrierError):
            self._have_read.wait()

    def _read(self, disk: qedfuse.DiskFile) -> str:
        """Read what a boot reads; return what was wrong, or an empty text."""
        for offset, length in boot_reads(len(self._content)):
            disk.seek(offset)
            if disk.read(length) != self._content[offset : offset + length]:
                return f"wrong bytes at {offset}"
        return ""


def main(words: Sequence[str]) -> int:
    """Boot all machines at the same moment; print the first failure."""
    url, raw, caches, number = words
    machines = Machines(url, Path(raw).read_bytes(), int(number))
    with ThreadPoolExecutor(int(number)) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        each = [pool.submit(machines.boot, f"{caches}-{at}") for at in range(int(number))]
        machines.wait_until_read()
        print("read", flush=True)
        sys.stdin.readline()
        machines.may_end.set()
        failures = [text for text in (future.result() for future in each) if text]
    print(*failures[:1])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
