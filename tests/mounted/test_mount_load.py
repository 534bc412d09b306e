"""Mounts under load: several processes write concurrently, and a server is killed meanwhile."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

import qedfuse
from tests.support import qemu
from tests.support.disks import has_need_check
from tests.support.mounted import KEEPS_NEED_CHECK, clean_up, front, mounted

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 32 << 20
BLOCK_BYTES: Final = 4096

WRITER: Final = """
import mmap, os, sys
path, number, of, blocks = sys.argv[1], *map(int, sys.argv[2:])
fd = os.open(path, os.O_RDWR | (os.O_DIRECT if number % 2 else 0))
block = mmap.mmap(-1, 4096)
for index in range(number, blocks, of):
    block[:] = (b"%08d" % index) * 512
    assert os.pwrite(fd, block, index * 4096) == 4096
os.fsync(fd)
"""


def test_processes_write_concurrently_into_the_same_clusters(tmp_path: Path) -> None:
    """Four writers, buffered and direct, share each new cluster and lose nothing."""
    image = qemu.create(tmp_path / "shared.qed", DISK_BYTES)
    blocks = DISK_BYTES // BLOCK_BYTES // 2
    with mounted(image, tmp_path / "mnt", prelude=KEEPS_NEED_CHECK) as directory:
        disk = directory / "shared.raw"
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, disk, str(number), "4", str(blocks)])
            for number in range(4)
        ]
        assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
        assert has_need_check(image), "the tables have changed on disk"
    assert not has_need_check(image)
    expected = b"".join((b"%08d" % index) * 512 for index in range(blocks))
    assert qemu.content(image)[: len(expected)] == expected
    assert qemu.check(image).code == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.expect_log("was not closed cleanly")
def test_a_killed_server_loses_nothing_that_was_flushed(seed: int, tmp_path: Path) -> None:
    """Flushed data survives a kill, other data is old or new, and the check finds only leaks."""
    chance = random.Random(seed)
    image = qemu.create(tmp_path / "killed.qed", DISK_BYTES)
    flushed: dict[int, bytes] = {}
    pending: dict[int, list[bytes]] = {}
    with front(image, tmp_path / "mnt", prelude=KEEPS_NEED_CHECK) as mount:
        fd = os.open(mount.mountpoint / "killed.raw", os.O_RDWR | os.O_DIRECT)
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        for step in range(chance.randrange(150, 300)):
            block = chance.randrange(DISK_BYTES // BLOCK_BYTES)
            buffer[:] = chance.randbytes(8) * 512
            os.pwrite(fd, buffer, block * BLOCK_BYTES)
            pending.setdefault(block, []).append(bytes(buffer))
            if step % 40 == 39:
                os.fsync(fd)
                flushed.update((number, versions[-1]) for number, versions in pending.items())
                pending.clear()
        mount.signal(signal.SIGKILL)
        mount.process.wait()
        with suppress(OSError):  # the flush of the close finds no server
            os.close(fd)
        clean_up(mount.mountpoint)
    assert has_need_check(image)
    with qedfuse.open(image, "r+b") as disk:
        content = disk.read()
    for block in range(DISK_BYTES // BLOCK_BYTES):
        found = content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        old = flushed.get(block, bytes(BLOCK_BYTES))
        assert found in (old, *pending.get(block, [])), block
    assert qemu.check(image).code in (0, 3)
    assert not has_need_check(image)
