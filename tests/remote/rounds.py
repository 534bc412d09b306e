"""Disasters of the cache and of the server, drawn at random: right bytes or an error, nothing else.

    python -m tests.remote.rounds --rounds 1000 --seed 7

A cache lives through all rounds, so that damage meets what earlier damage has left.  After each
disaster the server is well again, and then all bytes must be right, without an error.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from qedfuse.errors import CacheError, HostError, ObjectChangedError, RemoteError
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.remote.roundreaders import UNITS
from tests.support.cachedisasters import MountedTmpfs, write_to_disk
from tests.support.remotes import DEADLINES, MAX_SECONDS, opened, read, some_bytes
from tests.support.webserver import Fault, WebServer, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.remote.remotefile import RemoteFile

_ROOT: Final = Path(__file__).parents[2]
_QUICK_FAULTS: Final[list[Fault]] = [
    fault
    for fault in get_args(Fault)
    if fault not in {"stall", "silence", "trickle", "slow header", "endless", "redirect elsewhere"}
]
_SLOW_FAULTS: Final[list[Fault]] = ["stall", "silence", "trickle", "slow header", "endless"]


class WrongBytesError(Exception):
    """A read has returned bytes that the object does not have."""


class Rounds:
    """A server, a cache, and what happens to them.

    Attributes:
        happened: How often each disaster has happened, and how many reads failed or succeeded.
    """

    def __init__(
        self, server: WebServer, directory: Path, seed: int, only: str | None = None
    ) -> None:
        """Draw disasters from ``seed``, or take that named ``only``; work in ``directory``."""
        self.happened = Counter[str]()
        self._server = server
        self._cache = directory / "cache"
        self._other = directory / "other"
        self._random = random.Random(seed)
        # How often a disaster draws depends on what it finds; the order must not depend on that.
        self._order = random.Random(f"order {seed}")
        self._number = 0
        self._replace()
        self._disasters: list[Callable[[], None]] = [
            *(self.kill, self.flip, self.flip, self.cut, self.remove, self.remove),
            *(self.two_processes, self.overwrite, self.damage_in_use, self.damage_in_use),
            *(self.rot_in_use, self.rot_in_use, self.rot_between_processes),
            *(self.fault, self.fault, self.full, self.read_only, self.limit, self.others),
        ]
        if only is not None:
            self._disasters = [getattr(self, only)]
        self._next: list[Callable[[], None]] = []

    def round(self) -> None:
        """Let one disaster happen, and check all bytes afterwards.

        Raises:
            WrongBytesError: A read has returned other bytes than those of the object.
        """
        self._number += 1
        if not self._next:
            self._next = self._order.sample(self._disasters, len(self._disasters))
        disaster = self._next.pop()
        self.happened[disaster.__name__] += 1
        disaster()
        self._server.always, self._server.faults = None, []
        with opened(self._server.url, self._cache) as file:
            self._compare(file, 0, self._server.content)

    def kill(self) -> None:
        """Kill a process that fills the cache."""
        with self._start() as process:
            assert process.stdout is not None
            for _ in range(self._random.randrange(8)):
                process.stdout.readline()
            process.kill()

    def two_processes(self) -> None:
        """Let processes fill one entry; sometimes kill one."""
        processes = [self._start() for _ in range(2)]
        if self._random.random() < 0.3:
            processes[0].kill()
        for process in processes:
            process.communicate(timeout=60)
            if process.returncode not in {0, -9}:
                raise WrongBytesError(process.args)

    def flip(self) -> None:
        """Flip bits of files of the cache, of the map more often than chance would have it."""
        for _ in range(self._random.randrange(1, 4)):
            if path := self._some_file():
                size = path.stat().st_size
                with path.open("r+b") as file:
                    offset = self._random.randrange(max(size, 1))
                    file.seek(offset)
                    byte = file.read(1) or b"\0"
                    file.seek(offset)
                    file.write(bytes([byte[0] ^ (1 << self._random.randrange(8))]))

    def cut(self) -> None:
        """Change the length of a file of the cache."""
        if path := self._some_file():
            size = path.stat().st_size
            os.truncate(path, self._random.choice([0, size // 2, max(0, size - 1), size + 1]))

    def remove(self) -> None:
        """Remove a file or a directory of the cache, or replace a file by something else."""
        path = self._random.choice([self._cache, *self._paths()])
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        # A file in the place of an object or of the cache itself is not removed by the cache.
        is_inside = path.name in {"data", "map", "about.json"}
        if is_inside and self._random.random() < 0.3:
            path.write_bytes(b"x")

    def damage_in_use(self) -> None:
        """Cut or remove files of the cache while they are read, beside another reader."""
        with opened(self._server.url, self._cache) as file:
            self._read_some(file, self._server.content)
            self._random.choice([self.cut, self.remove])()
            self._read_some(file, self._server.content)
            with suppress(HostError), opened(self._server.url, self._cache) as other:
                self._read_some(other, self._server.content)
                self._read_some(file, self._server.content)
            self._compare(file, 0, self._server.content)

    def rot_in_use(self) -> None:
        """Let the disk lose what is read, while the server answers or not."""
        with opened(self._server.url, self._cache, deadlines=DEADLINES) as file:
            self._compare(file, 0, self._server.content)
            for _ in range(3):
                self._rot()
                if self._random.random() < 0.3:
                    self._server.faults = ["status 503"] * self._random.randrange(1, 20)
                self._read_some(file, self._server.content)
                self._server.faults = []
            self._compare(file, 0, self._server.content)

    def rot_between_processes(self) -> None:
        """Let the disk lose what two processes read all the time."""
        with opened(self._server.url, self._cache) as file:
            self._compare(file, 0, self._server.content)
            processes = [self._start("follow") for _ in range(2)]
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            for _ in range(20):
                with _paused(processes):
                    self._rot()
                self._server.faults = ["status 503"] * self._random.randrange(3)
                time.sleep(self._random.random() / 50)
            self._server.faults = []
            for process in processes:
                try:
                    process.communicate(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
                if process.returncode:
                    raise WrongBytesError(process.args)
            self._compare(file, 0, self._server.content)

    def _rot(self) -> None:
        """Change blocks of the data on the disk, and drop all of it from the page cache."""
        for path in self._paths():
            try:
                fd = os.open(path, os.O_RDWR)
            except OSError:
                continue  # a directory, or removed meanwhile because the disk is nearly full
            if path.name != "data" or os.fstat(fd).st_size <= len(self._server.content):
                os.close(fd)
                continue
            block = self._random.randrange(len(self._server.content) // 4096) * 4096
            kind = self._random.choice(["flip", "hole", "hole", "other block", "none"])
            self.happened[f"rot: {kind}"] += 1
            try:
                if kind == "hole":
                    length = self._random.choice([4096, UNIT_BYTES])
                    fallocate(fd, FALLOC_PUNCH_HOLE, block, length)
                elif kind != "none":
                    write_to_disk(
                        fd, block, bit=self._random.randrange(8 * 4096) * (kind == "flip")
                    )
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def others(self) -> None:
        """Fill a cache beside files that are not its own, until it is full; none may be gone."""
        directory = self._other / "named"
        outside = self._other / "outside"
        for path in (directory / "documents", outside, directory / "qedfuse" / "x"):
            path.mkdir(parents=True, mode=0o700)
            (path / "letter").write_text("x")
            os.utime(path, (1, 1))
        (directory / "link").symlink_to(outside)
        try:
            names = sorted(path for path in self._other.rglob("*"))
            with suppress(CacheError), opened(self._server.url, directory, cache_bytes=0) as file:
                self._compare(file, 0, self._server.content)
            shutil.rmtree(directory / "qedfuse")
            names = [path for path in names if "qedfuse" not in path.parts]
            for limit in (0, UNIT_BYTES, None):
                with opened(self._server.url, directory, cache_bytes=limit) as file:
                    self._compare(file, 0, self._server.content)
            if missing := [path for path in names if not os.path.lexists(path)]:
                raise FileNotFoundError(missing)
        finally:
            shutil.rmtree(self._other)

    def overwrite(self) -> None:
        """Replace the object while it is read."""
        with opened(self._server.url, self._cache) as file:
            before = self._server.content
            self._read_some(file, before)
            self._server.obeys_conditions = self._random.random() < 0.5
            self._replace()
            for _ in range(3):
                self._read_some(file, before, ObjectChangedError)

    def fault(self) -> None:
        """Read, also the cache afresh, from a server with faults.

        A server that gives another object from the beginning on is not one of them.
        """
        if self._random.random() < 0.5:
            shutil.rmtree(self._cache)
        faults = _SLOW_FAULTS if self._random.random() < 0.1 else _QUICK_FAULTS
        fault = self._random.choice(faults)
        self.happened[f"fault {fault}"] += 1
        always: Fault | None = None
        if fault != "other etag":
            if self._random.random() < 0.5:
                self._server.faults = [fault] * self._random.randrange(1, 4)
            else:
                self._server.always = fault
        elif self._random.random() < 0.5:
            always = fault
        begin = time.monotonic()
        with (
            suppress(RemoteError),
            opened(self._server.url, self._cache, deadlines=DEADLINES) as file,
        ):
            if self._random.random() < 0.5:
                self._server.always, self._server.faults = None, []
            if fault == "other etag":
                self._server.always = always
                self._server.faults = [fault] * self._random.randrange(1, 4)
            self._read_some(file, self._server.content)
        if time.monotonic() - begin > 2 * MAX_SECONDS:
            raise TimeoutError(fault)

    def full(self) -> None:
        """Read through a cache on a file system that becomes full, and once more through it."""
        size = self._random.randrange(16, int(UNITS * UNIT_BYTES) // 1024)
        with MountedTmpfs(self._other, f"size={size}k,mode=700") as is_mounted:
            self.happened["full: on a tmpfs" if is_mounted else "full: cannot mount"] += 1
            room = os.statvfs(self._other)
            if is_mounted and room.f_blocks * room.f_frsize >= len(self._server.content):
                msg = f"{self._other}: found space for the whole object, expected too little"
                raise OSError(msg)
            for _ in range(2):
                with opened(self._server.url, self._other) as file:
                    self._compare(file, 0, self._server.content)
                    self._compare(file, 0, self._server.content)

    def read_only(self) -> None:
        """Read through a cache on a file system that becomes read-only before or meanwhile."""
        with MountedTmpfs(self._other, "size=16m,mode=700") as is_mounted:
            with opened(self._server.url, self._other) as file:
                self._read_some(file, self._server.content)
            if not is_mounted:
                self.happened["read-only: cannot mount"] += 1
                return
            self.happened["read-only: on a tmpfs"] += 1
            subprocess.run(["mount", "-o", "remount,ro", self._other], check=True)
            with opened(self._server.url, self._other) as file:
                self._compare(file, 0, self._server.content)

    def limit(self) -> None:
        """Read through a cache that may not hold all of the object."""
        limit = self._random.randrange(int(UNITS * UNIT_BYTES))
        with opened(self._server.url, self._cache, cache_bytes=limit) as file:
            self._compare(file, 0, self._server.content)

    def _replace(self) -> None:
        """Give the server another object."""
        self._server.content = some_bytes(UNITS, seed=self._number)
        self._server.etag = f'"{self._number}"'
        self._server.modified = 1e9 + self._number

    def _start(self, task: str = "read") -> subprocess.Popen[bytes]:
        """Start a process that reads all, compares it, and prints a line for each unit.

        With the task ``follow`` it reads again and again until its input ends.
        """
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.remote.roundreaders", task, self._server.url),
                *(str(self._cache), self._server.etag.strip('"')),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
        )

    def _paths(self) -> list[Path]:
        """Return what lies in the cache, while entries may vanish."""
        return sorted(
            Path(parent, name)
            for parent, directories, names in os.walk(self._cache)
            for name in (*directories, *names)
        )

    def _some_file(self) -> Path | None:
        paths = [path for path in self._paths() if path.is_file()]
        return self._random.choice(paths) if paths else None

    def _read_some(
        self, file: RemoteFile, content: bytes, kind: type[HostError] = RemoteError
    ) -> None:
        """Read some ranges at random; each read has the right bytes or fails with ``kind``."""
        for _ in range(4):
            offset = self._random.randrange(len(content))
            length = self._random.choice([1, 4096, UNIT_BYTES, 3 * UNIT_BYTES])
            try:
                self._compare(file, offset, content[offset : offset + length])
            except kind:
                self.happened["reads that failed"] += 1

    def _compare(self, file: RemoteFile, offset: int, expected: bytes) -> None:
        view = memoryview(bytearray(len(expected)))
        is_right = not file.try_read(offset, view) or view == expected
        if not is_right or read(file, offset, len(expected)) != expected:
            msg = f"round {self._number}: wrong bytes at {offset}, {len(expected)} bytes"
            raise WrongBytesError(msg)
        self.happened["reads that succeeded"] += 1


@contextmanager
def _paused(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Let processes that follow pause during the block.

    So no process is between a check of what it reads and the read itself when the disk loses data.
    LocalData (remote/localdata.py) says what may happen in this short time.
    """
    for process in processes:
        _pass_byte(process)
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    yield
    for process in processes:
        _pass_byte(process)


def _pass_byte(process: subprocess.Popen[bytes]) -> None:
    """Write a byte to a process; one that has ended is found by its exit code later."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(b".")
        process.stdin.flush()


def main() -> int:
    """Run the rounds that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--only", metavar="DISASTER", help="let only this disaster happen")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    logging.disable()
    print(f"seed {arguments.seed}", flush=True)  # noqa: T201  output of a script
    with tempfile.TemporaryDirectory() as directory, serving(b"") as server:
        rounds = Rounds(server, Path(directory), arguments.seed, arguments.only)
        server.elsewhere = "http://127.0.0.2:1/disk.qed"
        for _ in range(arguments.rounds):
            rounds.round()
    for name, count in sorted(rounds.happened.items()):
        print(f"{count:7} {name}")  # noqa: T201  output of a script
    print(f"{arguments.rounds} rounds: all bytes right")  # noqa: T201  output of a script
    return 0


if __name__ == "__main__":
    sys.exit(main())
