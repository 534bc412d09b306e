"""Loop devices and mounted file systems for tests."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def run(*command: str | Path) -> str:
    """Run a command that must succeed; return its output."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def _delete_partitions(device: str) -> None:
    """Remove all partitions of a device.

    A program of another test, which looks at all block devices, may have a partition open for a
    moment, and then the kernel refuses.
    """
    name = Path(device).name
    end = time.monotonic() + 60
    while any(Path("/sys/class/block").glob(f"{name}p*")):
        done = subprocess.run(["partx", "--delete", device], capture_output=True, check=False)
        assert not done.returncode or time.monotonic() < end, done.stderr


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """Attach a file to a loop device for the block; yield the path of the device."""
    device = run("losetup", "--find", "--show", *options, path).strip()
    name = Path(device).name
    # Where the kernel does not read partition tables, partx adds the partitions.
    by_hand = "--partscan" in options and not Path(f"/sys/class/block/{name}p1").exists()
    if by_hand:
        run("partx", "--add", device)
    try:
        yield device
    finally:
        if by_hand:
            _delete_partitions(device)
        run("losetup", "--detach", device)


@contextmanager
def file_system(device: str | Path, directory: Path) -> Iterator[Path]:
    """Mount a file system for the block; yield its directory, which is created if missing."""
    directory.mkdir(exist_ok=True)
    run("mount", device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)
