"""A host's disk of which some sectors cannot be read, underneath a mount."""

from __future__ import annotations

import errno
import mmap
import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.mounted import mounted
from tests.support.pagecache import drop_pages

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")

DISK_BYTES: Final = 32 << 20
CHUNK: Final = 128 << 10


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("options", ["ro", "rw"])
def test_an_unreadable_sector_is_an_error(options: str, passes: int, tmp_path: Path) -> None:
    """A range that the host cannot read is an error in each pass, and neither zeros nor an end.

    ``passes`` is how often the whole disk was read before the sectors become unreadable.
    """
    host = tmp_path / "host"
    with host.open("wb") as file:
        file.truncate(2 * DISK_BYTES)
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(host, "--direct-io=on"))
        run("mkfs.ext4", "-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        directory = stack.enter_context(file_system(device, tmp_path / "fs"))
        image = qemu.create(directory / "vm.qed", DISK_BYTES)
        qemu.io(image, f"write -P {ord('d')} 0 {DISK_BYTES}")
        mountpoint = stack.enter_context(mounted(image, tmp_path / "mnt", "-o", options))
        disk = mountpoint / "vm.raw"
        for _ in range(passes):
            assert disk.read_bytes() == b"d" * DISK_BYTES
        run("sync", "-f", image)
        drop_pages(disk)
        drop_pages(image)
        # The loop device returns an error for sectors past the end of its file.
        content = host.stat().st_size
        lines = run("filefrag", "-e", image).splitlines()
        blocks = [int(end) for line in lines for end in re.findall(r"\.\. *(\d+): +\d+:", line)]
        os.truncate(host, max(blocks) * 4096 - DISK_BYTES // 4)
        errors = []
        for _ in range(3):
            for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT):
                fd = os.open(disk, flags)
                for offset in range(0, DISK_BYTES, CHUNK):
                    try:
                        found = read(fd, offset)
                    except OSError as error:
                        errors.append(error.errno)
                    else:
                        assert found == b"d" * CHUNK, (offset, found[:1], len(found))
                os.close(fd)
            assert disk.stat().st_size == DISK_BYTES
        assert set(errors) == {errno.EIO}
        assert len(errors) > DISK_BYTES // 8 // CHUNK
        os.truncate(host, content)
        drop_pages(image)


def read(fd: int, offset: int) -> bytes:
    """Read a chunk, into memory that is aligned as O_DIRECT demands; fewer bytes mean the end."""
    with mmap.mmap(-1, CHUNK) as buffer:
        done = 0
        # After the bytes before a bad sector the kernel ends a call, and the next one fails.
        while done < CHUNK and (count := os.preadv(fd, [memoryview(buffer)[done:]], offset + done)):
            done += count
        return buffer[:done]
