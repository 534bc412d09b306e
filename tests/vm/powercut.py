"""Power cuts: a workload that runs until the machine is killed, and a check of its disks.

Runs as root in the virtual machine.  ``work`` makes a file system on the third drive, puts
two images on it, and writes to both concurrently: to one as a raw disk, to the other through
ext4 on a loop device.  After each fsync(2) it writes a mark, which appears in the drive's log
(`tests.vm.replay`).  ``check`` examines disks made from such logs: what was synced is there,
every other sector has its old or its new content, and no check of a file system or an image
finds an error.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.vm.replay import MARK, MARK_AREA_BYTES, MARK_MAGIC, READY, SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

RAW, FILES = 1, 2
"""Kinds of marks: the number of the last operation, and of the last file, that was synced."""

RAW_BYTES: Final = 48 << 20
FILES_BYTES: Final = 200 << 20
OPERATIONS_PER_SYNC: Final = 10
FILES_KEPT: Final = 30
MAX_FILE_BYTES: Final = 200_000
TIMEOUT_SECONDS: Final = 300
"""Timeout of a command."""

_HOST: Final = Path("/srv/host")
_RAW: Final = Path("/srv/raw")
_DISK: Final = Path("/srv/disk")
_FILES: Final = Path("/srv/files")
_IMAGES: Final = {"raw": _RAW, "disk": _DISK}
_BLOCK: Final = 4096


def run(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command, which must end with one of ``codes``; give its output.

    Raises:
        AssertionError: The command ended otherwise.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    words = " ".join(map(str, command))
    assert done.returncode in codes, f"{words}: {done.returncode}: {done.stdout[-400:]}"
    return done.stdout.strip()


class Marks:
    """Marks in the log of the drive, written with O_DIRECT."""

    def __init__(self, device: str) -> None:
        """Write to the end of ``device``."""
        self._fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
        self._start = os.lseek(self._fd, 0, os.SEEK_END) - MARK_AREA_BYTES

    def leave(self, kind: int, number: int) -> None:
        """Record that all operations up to ``number`` are synced."""
        with mmap.mmap(-1, _BLOCK) as page:  # aligned, as O_DIRECT requires
            page[: MARK.size] = MARK.pack(MARK_MAGIC, kind, number)
            os.pwrite(self._fd, page, self._start + kind * _BLOCK)


def operation(seed: int, number: int) -> tuple[bool, int, int]:
    """Return an operation on the raw disk: whether it is a discard, its first byte, its length."""
    chance = random.Random(f"{seed} {number}")
    length = chance.choice((SECTOR, 4096, 20480, 1 << 16, 1 << 17, 1 << 20))
    start = chance.randrange(0, RAW_BYTES - length, SECTOR)
    return chance.random() < 0.2, start, length


def sectors(number: int, start: int, length: int) -> bytes:
    """Return the data of operation ``number``: each sector holds that number and its own."""
    first = start // SECTOR
    return b"".join(
        struct.pack("<QQ", number + 1, sector) * (SECTOR // 16)
        for sector in range(first, first + length // SECTOR)
    )


def file_content(seed: int, number: int) -> bytes:
    """Return the content of file ``number``."""
    chance = random.Random(f"{seed} file {number}")
    return chance.randbytes(chance.randrange(1, MAX_FILE_BYTES))


def write_raw(seed: int, marks: Marks) -> None:
    """Write to the raw disk until the power fails."""
    fd = os.open(_RAW / "raw.raw", os.O_RDWR)
    number = 0
    while True:
        is_discard, start, length = operation(seed, number)
        if is_discard:
            run("fallocate", "--punch-hole", "--offset", str(start), "--length", str(length),
                _RAW / "raw.raw")  # fmt: skip
        else:
            os.pwrite(fd, sectors(number, start, length), start)
        if number % OPERATIONS_PER_SYNC == OPERATIONS_PER_SYNC - 1:
            os.fsync(fd)
            marks.leave(RAW, number)
        number += 1


def write_files(seed: int, marks: Marks) -> None:
    """Write files until the power fails."""
    directory = os.open(_FILES, os.O_RDONLY | os.O_DIRECTORY)
    number = 0
    while True:
        (_FILES / str(number - FILES_KEPT)).unlink(missing_ok=True)
        path = _FILES / "new"
        with path.open("wb") as file:
            file.write(file_content(seed, number))
            file.flush()
            os.fsync(file.fileno())
        path.rename(_FILES / str(number))
        os.fsync(directory)
        marks.leave(FILES, number)
        number += 1


def options(seed: int) -> tuple[list[str], str]:
    """Return the mount options of the images, and whether the loop device uses direct I/O."""
    chance = random.Random(f"{seed} options")
    mount = chance.choice(([], ["-o", "commit=1"], ["-o", "detect_zeroes=unmap"]))
    return mount, chance.choice(("on", "off"))


def work(device: str, seed: int) -> None:
    """Prepare the disk and write until the power fails."""
    for directory in (_HOST, _RAW, _DISK, _FILES):
        directory.mkdir(parents=True)
    size = int(run("blockdev", "--getsize64", device)) - MARK_AREA_BYTES
    run("mkfs.ext4", "-q", device, f"{size >> 10}k")
    run("mount", device, _HOST)
    mount, direct_io = options(seed)
    for name, bytes_ in (("raw", RAW_BYTES), ("disk", FILES_BYTES)):
        run("qedimg", "create", _HOST / f"{name}.qed", str(bytes_))
        run("qedfuse", *mount, _HOST / f"{name}.qed", _IMAGES[name])
    words = ("losetup", "--find", "--show", f"--direct-io={direct_io}")
    loop = run(*words, _DISK / "disk.raw")
    run("mkfs.ext4", "-q", loop)
    run("mount", "-o", "discard", loop, _FILES)
    run("sync")
    marks = Marks(device)
    marks.leave(READY, seed)
    for target in (write_raw, write_files):
        threading.Thread(target=run_writer, args=(target, seed, marks)).start()
    print("CUT-ME", flush=True)


def run_writer(target: object, seed: int, marks: Marks) -> None:
    """Run a writer; end the program if it fails, so that the round fails."""
    try:
        target(seed, marks)  # type: ignore[operator]
    except BaseException as error:  # noqa: BLE001
        print(f"{error!r}", flush=True)
        os._exit(1)


@contextmanager
def opened(device: str) -> Iterator[None]:
    """Mount the file system of a disk; after the block its check must find nothing."""
    run("mount", device, _HOST)  # replays its journal
    try:
        yield
    finally:
        run("umount", _HOST)
    run("e2fsck", "-f", "-n", device)


def check_images() -> None:
    """Check both images; leaked clusters (code 3) are not an error."""
    for name in _IMAGES:
        run("qedimg", "check", _HOST / f"{name}.qed", codes=(0, 3))
        run("qemu-img", "check", "-f", "qed", _HOST / f"{name}.qed", codes=(0, 3))


@contextmanager
def mounted(name: str) -> Iterator[Path]:
    """Mount an image."""
    run("qedfuse", _HOST / f"{name}.qed", _IMAGES[name])
    try:
        yield _IMAGES[name] / f"{name}.raw"
    finally:
        run("qedfuse", "umount", _IMAGES[name])


def check_raw(disk: Path, seed: int, synced: int) -> None:
    """Compare each sector of the raw disk with the contents that it may hold."""
    allowed: list[set[int]] = [{0} for _ in range(RAW_BYTES // SECTOR)]
    for number in range(synced + OPERATIONS_PER_SYNC + 1):
        is_discard, start, length = operation(seed, number)
        value = 0 if is_discard else number + 1
        for sector in range(start // SECTOR, (start + length) // SECTOR):
            if number <= synced:
                allowed[sector] = {value}
            else:
                allowed[sector].add(value)
    with disk.open("rb") as file:
        for sector, values in enumerate(allowed):
            data = file.read(SECTOR)
            number, place = struct.unpack_from("<QQ", data)
            if number:
                assert place == sector, f"raw: sector {sector} holds the data of {place}"
            whole = struct.pack("<QQ", number, sector if number else 0) * (SECTOR // 16)
            assert data == whole, f"raw: sector {sector} is torn"
            assert number in values, f"raw: sector {sector} holds {number}, expected {values}"


def check_files(disk: Path, seed: int, synced: int) -> None:
    """Check that each synced file exists, and that each file has its content."""
    loop = run("losetup", "--find", "--show", disk)
    try:
        run("mount", loop, _FILES)  # replays its journal
        try:
            names = {int(path.name) for path in _FILES.iterdir() if path.name.isdecimal()}
            due = set(range(max(0, synced - FILES_KEPT + 2), synced + 1))
            assert due <= names, f"files: {sorted(due - names)} are missing"
            for number in names:
                content = (_FILES / str(number)).read_bytes()
                assert content == file_content(seed, number), f"file {number}: wrong content"
        finally:
            run("umount", _FILES)
        run("e2fsck", "-f", "-n", loop)
    finally:
        run("losetup", "--detach", loop)


def check(device: str) -> tuple[dict[str, object], list[str]]:
    """Check one disk; return the facts of its cut, and what is wrong."""
    with Path(device).open("rb") as disk:
        disk.seek(-MARK_AREA_BYTES, os.SEEK_END)
        facts = json.loads(disk.read(MARK_AREA_BYTES).rstrip(b"\0"))
    synced = {int(kind): number for kind, number in facts["synced"].items()}
    seed = synced[READY]
    try:
        with opened(device):
            check_images()
            with ExitStack() as stack:
                check_raw(stack.enter_context(mounted("raw")), seed, synced.get(RAW, -1))
                check_files(stack.enter_context(mounted("disk")), seed, synced.get(FILES, -1))
            check_images()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return facts, [" ".join(str(error).split())]
    return facts, []


def check_all(count: int, first: int) -> int:
    """Check the disks of ``count`` rounds and print a line for each; return the exit code."""
    bad = 0
    for directory in (_HOST, _RAW, _DISK, _FILES):
        directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        facts, faults = check(f"/dev/vd{chr(ord('c') + number)}")
        bad += bool(faults)
        cut = "whole" if facts["whole"] else f"{facts['cut']}, kept {facts['keep']:.0%}"
        print(
            f"| {first + number} | {facts['entries']} | {cut}, unflushed {facts['unflushed']} "
            f"| {facts['synced']} | {'; '.join(faults) or 'none'} |",
            flush=True,
        )
    return min(bad, 1)


def main() -> int:
    """Read the command line; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("work", "check"))
    parser.add_argument("--count", type=int, default=1, help="disks to look at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    given = parser.parse_args()
    if given.what == "work":
        work("/dev/vdc", given.seed)
        return 0
    return check_all(given.count, given.first)


if __name__ == "__main__":
    sys.exit(main())
