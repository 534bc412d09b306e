"""One case: a mount, threads that change the disk, kills and remounts, against the model."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from tests.fuzz.model import SECTOR, Model
from tests.fuzz.plan import draw_plan
from tests.fuzz.worker import Worker
from tests.support import qemu
from tests.support.mounted import front

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.mounted import FrontMount

_MAX_GROWTH_BYTES: Final = 1 << 20
_MAX_GROWN_BYTES: Final = 16 << 20


class Case:
    """A case: its seed determines all that is done.

    Attributes:
        plan: The parameters drawn from the seed.
        kills: How often the server was killed.
        log: What was done, in order.
    """

    def __init__(self, seed: int, directory: Path) -> None:
        """Work in an empty directory."""
        self._chance = random.Random(seed)
        self.plan = draw_plan(self._chance)
        self._directory = directory
        self._image, content = self.plan.make_image(directory, self._chance)
        self._model = Model(content)
        self._stack = ExitStack()
        self._mount: FrontMount | None = None
        self.kills = 0
        self.log: list[str] = []

    def run(self) -> None:
        """Run the case.

        Raises:
            AssertionError: The disk differs from the model.
        """
        with self._stack:
            self._attach()
            for _ in range(self.plan.phases):
                if self._work():
                    self._between()
                else:
                    self._recover()
            self._detach()
        assert qemu.check(self._image).errors == 0, "the image is damaged"
        self._compare("image", qemu.content(self._image))

    @property
    def _disk(self) -> Path:
        """The file of the mount."""
        mountpoint = self._directory / "mnt"
        return mountpoint if self.plan.on_file else mountpoint / "disk.raw"

    def _attach(self) -> None:
        """Mount."""
        mountpoint = self._directory / "mnt"
        if self.plan.on_file:
            mountpoint.touch()
        words = ",".join(self.plan.words)
        self._mount = self._stack.enter_context(front(self._image, "-o", words, mountpoint))

    def _detach(self) -> None:
        """Unmount, which makes everything durable."""
        assert self._mount is not None
        self.log.append("unmount")
        mark = self._model.begin_sync()
        self._mount.signal(signal.SIGTERM)
        code, log = self._mount.finish()
        assert code == 0, log
        assert "internal error" not in log, log
        self._stack.pop_all().close()
        self._model.end_sync(mark)

    def _work(self) -> bool:
        """Let the threads work; return False if the server was killed meanwhile."""
        kill_after = self._chance.choice([None, None, None, self._chance.random()])
        workers = [
            Worker(self._disk, self.plan, self._model, number, self._chance.getrandbits(32))
            for number in range(self.plan.threads)
        ]
        self.log.append(f"work, kill after {kill_after}")
        killer = None
        if kill_after is not None:
            killer = threading.Timer(0.3 * kill_after, self._kill, [workers])
            killer.start()
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if killer is not None:
            killer.join()
        for worker in workers:
            worker.close()
        for number, worker in enumerate(workers):
            self.log.extend(f"thread {number}: {line}" for line in worker.log)
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
        return killer is None

    def _kill(self, workers: list[Worker]) -> None:
        """Kill the server while no thread touches a memory map, which would raise SIGBUS."""
        assert self._mount is not None
        with ExitStack() as maps:
            for worker in workers:
                maps.enter_context(worker.mapping)
                worker.dead = True
            self._mount.signal(signal.SIGKILL)
            self._mount.process.wait()

    def _recover(self) -> None:
        """Mount again after a kill: synced sectors are there, each other sector is old or new."""
        self.kills += 1
        self.log.append("killed")
        self._stack.pop_all().close()
        self._attach()
        wrong = self._model.adopt(self._disk.read_bytes())
        assert wrong is None, f"after a kill: {wrong}"

    def _between(self) -> None:
        """Run operations that need the disk alone, and compare the whole disk."""
        fd = os.open(self._disk, os.O_RDWR)
        try:
            for _ in range(self._chance.randrange(1, 4)):
                name = self._chance.choice(
                    ["_grow", "_grow", "_empty", "_resize", "_copy", "_copy", "_walk", "_sync"]
                )
                self.log.append(name)
                getattr(self, name)(fd)
                assert os.fstat(fd).st_size == self._model.size
            self._compare("mount", self._disk.read_bytes())
        finally:
            os.close(fd)
        end = self._chance.choice(["nothing", "nothing", "nothing", "remount", "kill"])
        if end == "remount":
            self._detach()
            self._attach()
            self._compare("remounted", self._disk.read_bytes())
        elif end == "kill":
            self._kill([])
            self._recover()

    def _compare(self, what: str, content: bytes) -> None:
        """Compare a whole content with the model."""
        expected = self._model.read(0, self._model.size)
        assert len(content) == len(expected), f"{what}: {len(content)} bytes, not {len(expected)}"
        if content != expected:
            at = next(i for i in range(len(content)) if content[i] != expected[i])
            msg = (
                f"{what}: offset {at} (sector {at // SECTOR}): found "
                f"{content[at : at + 8].hex()}, expected {expected[at : at + 8].hex()}"
            )
            raise AssertionError(msg)

    # Operations that need the disk alone

    def _grow(self, fd: int) -> None:
        """Write past the end without a sync, and look for the data immediately."""
        size = self._model.size
        if not self.plan.growable or size >= _MAX_GROWN_BYTES:
            return
        start = size + SECTOR * self._chance.randrange(_MAX_GROWTH_BYTES // SECTOR)
        data = self._chance.randbytes(SECTOR * self._chance.randrange(1, 100))
        self._model.grow(start + len(data))
        number = self._model.begin(start, data)
        assert os.pwrite(fd, data, start) == len(data)
        self._model.end(number)
        self._chance.choice([self._walk, self._copy, self._sync, self._leave])(fd)

    def _leave(self, _fd: int) -> None:
        """Do nothing."""

    def _empty(self, fd: int) -> None:
        """Truncate to 0 in one of the ways, with or without a memory map that has dirty pages."""
        with ExitStack() as stack:
            pages = None
            if self.plan.maps and self._chance.random() < 0.5:
                pages = stack.enter_context(mmap.mmap(fd, self._model.size))
                data = self._chance.randbytes(100)
                start = self._chance.randrange(self._model.size - len(data))
                number = self._model.begin(start, data)
                pages[start : start + len(data)] = data
                self._model.end(number)
            way = self._chance.randrange(3)
            self.log.append(f"truncation {way}, map {pages is not None}")
            number = self._model.begin(0, bytes(self._model.size)) if self.plan.empties else 0
            try:
                if way == 0:
                    os.ftruncate(fd, 0)
                elif way == 1:
                    os.truncate(self._disk, 0)
                else:
                    os.close(os.open(self._disk, os.O_WRONLY | os.O_TRUNC))
            except PermissionError:
                assert not self.plan.empties
            else:
                assert self.plan.empties, "a truncation was not refused"
                self._model.end(number)
            assert os.fstat(fd).st_size == self._model.size
            if pages is not None:
                assert pages[:] == self._model.read(0, self._model.size), "the map"

    def _resize(self, fd: int) -> None:
        """Truncate to any other size."""
        old = self._model.size
        size = max(SECTOR, old + SECTOR * self._chance.randrange(-100, 100))
        cuts = size < old and self.plan.empties
        number = self._model.begin(size, bytes(old - size)) if cuts else 0
        try:
            os.ftruncate(fd, size)
        except PermissionError:
            assert not cuts
            assert size < old or not self.plan.growable
        else:
            if cuts:
                self._model.end(number)
            else:
                assert size == old or (size > old and self.plan.growable)
                self._model.grow(size)

    def _copy(self, _fd: int) -> None:
        """Copy the disk as cp does, with all its holes."""
        copy = self._directory / "copy"
        mode = self._chance.choice(["auto", "always"])
        subprocess.run(["cp", f"--sparse={mode}", self._disk, copy], check=True)
        self._compare("copy", copy.read_bytes())

    def _walk(self, fd: int) -> None:
        """Find data and holes from start to end: holes contain only zeros."""
        at, size = 0, self._model.size
        expected = self._model.read(0, size)
        while at < size:
            data = _seek_data(fd, at, size)
            assert not any(expected[at:data]), f"data in a hole from {at} to {data}"
            if data >= size:
                break
            at = os.lseek(fd, data, os.SEEK_HOLE)
            assert at > data, "a hole where data is"

    def _sync(self, fd: int) -> None:
        """Make everything durable."""
        mark = self._model.begin_sync()
        os.fsync(fd)
        self._model.end_sync(mark)


def _seek_data(fd: int, start: int, size: int) -> int:
    """Return the offset of the next data, or the size if there is none."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def run_case(seed: int, directory: Path) -> int:
    """Run the case with a seed in an empty directory; return how often it killed the server.

    Raises:
        AssertionError: The case has failed; the text has the command that repeats it.
    """
    case = Case(seed, directory)
    try:
        case.run()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        steps = "\n  ".join(case.log[-60:])
        msg = (
            f"{type(error).__name__}: {error}\ncase {seed}: {case.plan}\n  {steps}\n"
            f"again: python -m tests.fuzz --case {seed}"
        )
        raise AssertionError(msg) from error
    return case.kills
