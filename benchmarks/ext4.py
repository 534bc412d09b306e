"""An ext4 file system on a disk, through a loop device."""

from __future__ import annotations

import shutil
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks.commands import BenchmarkError, run

DETACH_SECONDS: Final = 10.0
TREE_BYTES: Final = 32 << 20
COPIES: Final = 3


class FileSystem:
    """An ext4 on a disk, mounted at ``root`` while it is attached.

    Args:
        disk: The disk.
        root: The mountpoint, which is created.
        direct: Whether the loop device uses O_DIRECT on the disk.  While the file
            system is made, the loop device uses buffered I/O: it then sends one request at a
            time, and even QEMU 7.2 writes correctly.
        read_only: Whether to mount the file system read-only after it was made.
    """

    def __init__(self, disk: Path, root: Path, *, direct: bool, read_only: bool) -> None:
        self.root: Final = root
        self._disk = disk
        self._direct = direct
        self._read_only = read_only
        self._device = ""
        self._mounted = False

    def make(self) -> None:
        """Make the file system and mount it, without O_DIRECT.

        Raises:
            BenchmarkError: A command failed.
        """
        self._attach(direct=False)
        # No lazy initialisation, because the kernel would continue it during the measurement.
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._device)
        self._mount("rw")

    def attach(self) -> None:
        """Attach and mount the file system for a measurement."""
        self._attach(direct=self._direct)
        self._mount("ro" if self._read_only else "rw")

    def detach(self) -> None:
        """Unmount the file system and detach the loop device.

        Raises:
            BenchmarkError: The file system is in use.
        """
        if self._mounted:
            run("umount", str(self.root))
            self._mounted = False
        if self._device:
            run("losetup", "--detach", self._device)
            # While udev has the device open, the kernel detaches it only later.
            end = time.monotonic() + DETACH_SECONDS
            while self._attached():
                if time.monotonic() > end:
                    msg = f"{self._device}: still attached to {self._disk}"
                    raise BenchmarkError(msg)
                time.sleep(0.02)
            self._device = ""

    def abandon(self) -> None:
        """Unmount and detach after a failure, as far as that is possible."""
        with suppress(BenchmarkError):
            if self._mounted:
                run("umount", "--lazy", str(self.root), seconds=10)
        with suppress(BenchmarkError):
            if self._device:
                run("losetup", "--detach", self._device, seconds=10)

    def _attach(self, *, direct: bool) -> None:
        options = ["--direct-io=on"] if direct else []
        command = ("losetup", "--find", "--show", *options, str(self._disk))
        self._device = run(*command).strip()
        # The kernel may silently ignore the request for direct I/O.
        found = run("losetup", "--noheadings", "--output", "DIO", self._device).strip()
        if found != str(int(direct)):
            msg = f"{self._device}: found direct I/O {found}, expected {direct:d}"
            raise BenchmarkError(msg)

    def _attached(self) -> bool:
        output = run("losetup", "--noheadings", "--output", "NAME,BACK-FILE")
        return f"{self._device} {self._disk}" in " ".join(output.split())

    def _mount(self, options: str) -> None:
        self.root.mkdir(exist_ok=True)
        run("mount", "-o", options, self._device, str(self.root))
        self._mounted = True


def make_tree(directory: Path) -> Path:
    """Create a directory with several copies of part of Python's library; return its path."""
    tree = directory / "tree"
    if tree.exists():
        return tree
    source = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(source.rglob("*.py"))
        if "site-packages" not in path.parts and "dist-packages" not in path.parts
    ]
    for number in range(COPIES):
        copied = 0
        for path in files:
            target = tree / str(number) / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied += path.stat().st_size
            if copied > TREE_BYTES:
                break
    return tree
