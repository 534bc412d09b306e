"""SIGKILL of a busy mount, repeated: synced data survives, and the file stays within its bound."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from qedfuse.ondisk.header import parse_header
from tests.support import extensions, qemu
from tests.support.disks import guest_bytes, header_of, inspect_image
from tests.support.mounted import clean_up, front

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 6 << 20
CLUSTER_BYTES: Final = 4096
BLOCK: Final = 4096
WRITERS: Final = 3
ROUNDS: Final = 20
"""Kills of a real process; tests/crash tries the states between any two writes."""
DEAD: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
"""Errors of a mount whose server was killed."""


class Writer(threading.Thread):
    """Writes, discards and syncs its own blocks until the mount dies.

    Attributes:
        allowed: What each block may hold if the mount is killed now.
        error: What ended it other than the mount's death.
    """

    def __init__(
        self, path: Path, blocks: range, content: bytes, seed: str, done: Countdown
    ) -> None:
        """Prepare to use some blocks of a disk that holds ``content``."""
        super().__init__()
        self._path = path
        self._blocks = blocks
        self._random = random.Random(seed)
        self._done = done
        self._buffer = mmap.mmap(-1, BLOCK)
        self.allowed = {n: [content[n * BLOCK : (n + 1) * BLOCK]] for n in blocks}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Work until the mount is gone."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
            try:
                while True:
                    self._act(fd)
                    self._done.count()
            finally:
                with suppress(OSError):  # the flush of the close finds no server
                    os.close(fd)
        except OSError as error:
            if error.errno not in DEAD or not self._done.is_over():
                self.error = error
        except BaseException as error:  # noqa: BLE001  handed to the test
            self.error = error
        finally:
            self._done.finish()

    def _act(self, fd: int) -> None:
        """Carry out one random action."""
        discards = 15 if extensions.EXPECTED else 0
        action = self._random.choices("wdfr", (60, discards, 8, 10))[0]
        block = self._random.choice(self._blocks)
        if action == "w":
            content = (block << 40 | self._random.getrandbits(40)).to_bytes(8, "little") * 512
            self.allowed[block].append(content)
            self._buffer[:] = content
            assert os.pwrite(fd, self._buffer, block * BLOCK) == BLOCK
        elif action == "d":
            count = min(self._random.randrange(1, 9), self._blocks[-1] + 1 - block)
            for number in range(block, block + count):
                self.allowed[number].append(bytes(BLOCK))
            fallocate(fd, FALLOC_PUNCH_HOLE, block * BLOCK, count * BLOCK)
        elif action == "f":
            os.fsync(fd)
            for versions in self.allowed.values():
                del versions[:-1]
        else:
            os.preadv(fd, [self._buffer], block * BLOCK)
            assert self._buffer[:] == self.allowed[block][-1], block


class Countdown:
    """Counts the actions of the writers; the mount may be killed when it reaches zero."""

    def __init__(self, target: int) -> None:
        """Expect ``target`` actions."""
        self._left = target
        self._lock = threading.Lock()
        self._enough = threading.Event()

    def count(self) -> None:
        """Count one action."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._enough.set()

    def finish(self) -> None:
        """Note that a writer has ended, so that the wait ends too."""
        self._enough.set()

    def is_over(self) -> bool:
        """Return whether the mount may have been killed."""
        return self._enough.is_set()

    def wait(self) -> None:
        """Wait until all expected actions are done or a writer has ended."""
        assert self._enough.wait(30), "the writers hang"


@pytest.mark.timeout(300)
def test_repeated_kills_lose_nothing_that_was_synced(tmp_path: Path) -> None:
    """Synced data survives each kill, other data is old or new, and the file stays in bounds."""
    image = qemu.create(tmp_path / "disk.qed", DISK_BYTES, cluster_size=CLUSTER_BYTES, table_size=2)
    header = parse_header(image.read_bytes()[:64], str(image))
    bound = header.geometry.bound(header.header_end, DISK_BYTES)
    content = bytes(DISK_BYTES)
    leaked = killed_dirty = 0
    for number in range(ROUNDS):
        done = Countdown(random.Random(number).randrange(30, 400))
        share = DISK_BYTES // BLOCK // WRITERS
        with front("-o", "commit=1", image, tmp_path / "mnt") as mount:
            writers = [
                Writer(
                    mount.mountpoint / "disk.raw",
                    range(share * index, share * (index + 1)),
                    content,
                    f"{number} {index}",
                    done,
                )
                for index in range(WRITERS)
            ]
            for writer in writers:
                writer.start()
            done.wait()
            mount.signal(signal.SIGKILL)
            mount.process.wait()
            for writer in writers:
                writer.join(30)
            clean_up(mount.mountpoint)
        file = image.read_bytes()
        found = inspect_image(file)
        assert found.errors == (), number
        assert len(file) <= bound, number
        content = guest_bytes(file)
        for writer in writers:
            assert writer.error is None, (number, writer.error)
            for block, versions in writer.allowed.items():
                assert content[block * BLOCK : (block + 1) * BLOCK] in versions, (number, block)
        leaked = max(leaked, found.leaks)
        killed_dirty += header_of(file).need_check
    # A round ends clean only if its kill comes before the first change of a table on disk.
    assert killed_dirty > ROUNDS // 2, f"only {killed_dirty} kills struck unfinished work"
    assert leaked > 0, "no kill left clusters that were allocated and not in a table yet"
    checked = qemu.check(image)
    assert checked.errors == 0
    with front(image, tmp_path / "mnt") as mount:
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    assert guest_bytes(image.read_bytes()) == content
