"""A thread of a case: it changes its own stripes of the disk and reads them back."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.systemcalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
from tests.fuzz.model import SECTOR
from tests.support import extensions

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuzz.model import Model
    from tests.fuzz.plan import Plan

GONE: Final = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV, errno.EINTR}
"""Errors that programs get when the server has been killed."""

_ZERO_RANGE: Final = 16 | FALLOC_KEEP_SIZE


class Worker:
    """One thread.

    Attributes:
        mapping: Held while a memory map is touched.
        dead: Whether the server has been killed.
        failure: The exception that ended the thread, if one did.
        log: The operations, in order.
    """

    def __init__(self, disk: Path, plan: Plan, model: Model, number: int, seed: int) -> None:
        """Work on the stripes with a number."""
        self.mapping = threading.Lock()
        self.dead = False
        self.failure: Exception | None = None
        self.log: list[str] = []
        self._disk = disk
        self._plan = plan
        self._model = model
        self._number = number
        self._chance = random.Random(seed)
        self._fds = [os.open(disk, os.O_RDWR | flags) for flags in (0, os.O_DIRECT, os.O_DSYNC)]

    def run(self) -> None:
        """Carry out the operations of a phase."""
        try:
            for _ in range(self._plan.operations):
                self._step()
        except OSError as error:
            if not (self.dead and error.errno in GONE):
                self.failure = error
        except Exception as error:  # noqa: BLE001  it is raised in the main thread
            self.failure = error

    def close(self) -> None:
        """Close the disk."""
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)

    def _step(self) -> None:
        """Carry out one operation."""
        name = self._chance.choices(
            ["_write", "_write_direct", "_write_synced", "_store", "_allocate", "_free",
             "_read", "_sync", "_seek"],
            [6, 2, 1, 3, 1, 2, 4, 1, 2],
        )[0]  # fmt: skip
        start, length = self._range()
        self.log.append(f"{name} {start} {length}")
        getattr(self, name)(start, length)

    def _range(self) -> tuple[int, int]:
        """Draw a range within one of its own stripes; a single thread owns the whole disk."""
        size, stripe = self._model.size, self._plan.stripe
        if self._plan.threads == 1:
            low, high = 0, size
        else:
            stripes = range(self._number, -(-size // stripe), self._plan.threads)
            low = self._chance.choice(stripes) * stripe
            high = min(size, low + stripe)
        start = self._chance.randrange(low, high)
        length = self._chance.choice([1, SECTOR, 4096, 70_000, high - low])
        if self._chance.random() < 0.5:
            start -= start % SECTOR
        return start, min(length, high - start)

    def _data(self, length: int) -> bytes:
        """Draw random bytes, or zeros in one of five cases."""
        if self._chance.random() < 0.2:
            return bytes(length)
        return self._chance.randbytes(length)

    def _write(self, start: int, length: int, which: int = 0) -> None:
        """Write through one of the handles."""
        data = self._data(length)
        number = self._model.begin(start, data)
        done = os.pwrite(self._fds[which], data, start)
        self._check_written(done, start, length)
        self._model.end(number)

    def _check_written(self, done: int, start: int, length: int) -> None:
        """Expect a complete write, or a short one because the server was killed."""
        if done != length and self.dead:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        assert done == length, f"wrote {done} of {length} bytes at {start}"

    def _write_direct(self, start: int, length: int) -> None:
        """Write with O_DIRECT, whole pages."""
        start -= start % 4096
        length = -(-length // 4096) * 4096
        stripe_end = (
            self._model.size
            if self._plan.threads == 1
            else (start - start % self._plan.stripe + self._plan.stripe)
        )
        length = min(length, stripe_end - start, self._model.size - start)
        length -= length % SECTOR
        data = self._data(length)
        with mmap.mmap(-1, max(length, 1)) as buffer:
            buffer[:length] = data
            number = self._model.begin(start, data)
            with memoryview(buffer)[:length] as view:
                done = os.pwritev(self._fds[1], [view], start)
            self._check_written(done, start, length)
            self._model.end(number)

    def _write_synced(self, start: int, length: int) -> None:
        """Write with O_DSYNC and sync: all writes that have ended are durable then."""
        self._write(start, length, 2)
        mark = self._model.begin_sync()
        os.fdatasync(self._fds[2])
        self._model.end_sync(mark)

    def _store(self, start: int, length: int) -> None:
        """Store into a shared memory map."""
        if not self._plan.maps:
            return
        data = self._data(length)
        with self.mapping:
            if self.dead:
                return
            first = start - start % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(self._fds[0], start + length - first, offset=first) as pages:
                number = self._model.begin(start, data)
                pages[start - first : start - first + length] = data
                self._model.end(number)

    def _allocate(self, start: int, length: int) -> None:
        """Allocate space, which keeps the content."""
        if not extensions.EXPECTED:
            return
        fallocate(self._fds[0], self._chance.choice([0, FALLOC_KEEP_SIZE]), start, length)

    def _free(self, start: int, length: int) -> None:
        """Punch or zero a range."""
        if not extensions.EXPECTED:
            return
        number = self._model.begin(start, bytes(length))
        fallocate(
            self._fds[0], self._chance.choice([FALLOC_PUNCH_HOLE, _ZERO_RANGE]), start, length
        )
        self._model.end(number)

    def _read(self, start: int, length: int) -> None:
        """Read and compare, through the kernel's cache or with O_DIRECT."""
        expected = self._model.read(start, length)
        if self._chance.random() < 0.7:
            found = os.pread(self._fds[0], length, start)
        else:
            first = start - start % 4096
            with mmap.mmap(-1, -(-(start + length - first) // 4096) * 4096) as buffer:
                count = os.preadv(self._fds[1], [buffer], first)
                found = buffer[start - first : min(count, start + length - first)]
        if self.dead and len(found) < length and found == expected[: len(found)]:
            # The kernel gives what it had when the server was killed.
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        assert found == expected, f"read at {start}: {length} bytes are not what was written"

    def _sync(self, _start: int, _length: int) -> None:
        """Make the writes of all threads durable."""
        mark = self._model.begin_sync()
        self._chance.choice([os.fsync, os.fdatasync])(self._fds[0])
        self._model.end_sync(mark)

    def _seek(self, start: int, length: int) -> None:
        """Seek data: it begins no later than the first byte that this thread wrote."""
        expected = self._model.read(start, length)
        first = next((at for at, byte in enumerate(expected) if byte), None)
        if first is None:
            return
        found = os.lseek(self._fds[0], start, os.SEEK_DATA)
        assert start <= found <= start + first, f"data at {start + first} is in a hole"
