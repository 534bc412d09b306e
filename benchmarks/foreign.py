"""Reads of a qcow2 image through qedfuse and through the FUSE export of QEMU's storage daemon.

    python -m benchmarks.foreign [--size MIB] [--seconds SECONDS] [--rounds ROUNDS] [--compressed]
        DIRECTORY

Both serve the same image, one after the other in each round, and the order alternates.  The table
has the median and the range of each figure, and the median of the ratios within the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.commands import run

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20
_START_SECONDS: Final = 20.0
_WARM_CHUNK_BYTES: Final = 4 * MIB


class Load(NamedTuple):
    """A load of fio's.

    Attributes:
        name: The load in words.
        options: The options of fio.
        is_warm: Whether the kernel's cache has the whole disk when the load begins.
        unit: What is counted: ``reads/s`` or ``MiB/s``.
        target: The ratio that is wanted; 0 for none.
    """

    name: str
    options: tuple[str, ...]
    is_warm: bool
    unit: str
    target: float


_RANDOM: Final = ("--rw=randread", "--bs=4k", "--fadvise_hint=random")
LOADS: Final = (
    Load("4 KiB, 1 in flight", (*_RANDOM, "--numjobs=1"), is_warm=False, unit="reads/s", target=0),
    Load(
        "4 KiB, 16 in flight", (*_RANDOM, "--numjobs=16"), is_warm=False, unit="reads/s", target=0.8
    ),
    Load(
        "1 MiB, in order", ("--rw=read", "--bs=1m", "--numjobs=1"), is_warm=False, unit="MiB/s",
        target=1,
    ),
    Load(
        "4 KiB, 16 in flight, cached", (*_RANDOM, "--numjobs=16", "--invalidate=0"), is_warm=True,
        unit="reads/s", target=0,
    ),
)  # fmt: skip


@contextmanager
def _qedfuse(image: Path, directory: Path) -> Iterator[Path]:
    """Mount an image with qedfuse for the block; yield the disk."""
    mountpoint = directory / "qedfuse"
    mountpoint.mkdir(exist_ok=True)
    command = (sys.executable, "-m", "qedfuse")
    run(*command, "-r", str(image), str(mountpoint))
    try:
        yield mountpoint / f"{image.name}.raw"
    finally:
        run(*command, "umount", str(mountpoint))


@contextmanager
def _storage_daemon(image: Path, directory: Path) -> Iterator[Path]:
    """Export an image with QEMU's storage daemon for the block; yield the disk."""
    disk = directory / "export"
    disk.touch()
    size = disk.stat().st_size
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=qcow2,node-name=image,file.driver=file,file.filename={image}",
            "--export",
            f"type=fuse,id=disk,node-name=image,mountpoint={disk},writable=off",
        ]
    )
    try:
        end = time.monotonic() + _START_SECONDS
        while disk.stat().st_size == size:
            if time.monotonic() > end or daemon.poll() is not None:
                msg = "qemu-storage-daemon does not export the image"
                raise SystemExit(msg)
            time.sleep(0.01)
        yield disk
    finally:
        daemon.terminate()
        daemon.wait()


def measure(disk: Path, load: Load, seconds: float) -> float:
    """Return the figure of a load on a disk."""
    _prepare(disk, is_warm=load.is_warm)
    output = run(
        *("fio", "--output-format=json", "--name=load", f"--filename={disk}", "--thread"),
        *("--ioengine=psync", "--readonly", "--group_reporting", "--time_based"),
        *(f"--runtime={round(seconds * 1000)}ms", *load.options),
        seconds=seconds + 60,
    )
    found = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    return float(found["iops"] if load.unit == "reads/s" else found["bw_bytes"] / MIB)


def _prepare(disk: Path, *, is_warm: bool) -> None:
    """Bring the whole disk into the kernel's cache, or remove it from there."""
    with disk.open("rb", buffering=0) as file:
        if is_warm:
            while file.read(_WARM_CHUNK_BYTES):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_image(directory: Path, size: int, *, is_compressed: bool) -> Path:
    """Return an image of ``size`` bytes of random data, of which all is in the page cache.

    Compressed data is text of random words of hexadecimal digits, so that it can be compressed.
    """
    image = directory / "image.qcow2"
    raw = directory / "image.raw"
    with raw.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB // 2).hex().encode() if is_compressed else os.urandom(MIB))
    options = ("-c",) if is_compressed else ()
    run("qemu-img", "convert", *options, "-O", "qcow2", str(raw), str(image), seconds=600)
    raw.unlink()
    _prepare(image, is_warm=True)
    return image


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compressed", action="store_true", help="compress all clusters")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    image = make_image(directory, arguments.size * MIB, is_compressed=arguments.compressed)
    servers = {"qedfuse": _qedfuse, "storage daemon": _storage_daemon}
    figures: dict[tuple[str, str], list[float]] = {}
    for number in range(arguments.rounds):
        order = list(servers)[:: 1 if number % 2 else -1]
        for name in order:
            with servers[name](image, directory) as disk:
                for load in LOADS:
                    found = measure(disk, load, arguments.seconds)
                    figures.setdefault((load.name, name), []).append(found)
                    print(f"{number} {name}: {load.name}: {found:.0f}", file=sys.stderr)
    print("| load | qedfuse | storage daemon | ratio | wanted |")
    print("| --- | --- | --- | --- | --- |")
    for load in LOADS:
        ours, theirs = (figures[load.name, name] for name in servers)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        wanted = f"{load.target:g}" if load.target else ""
        texts = [
            f"{statistics.median(x):,.0f} ({min(x):,.0f} to {max(x):,.0f}) {load.unit}"
            for x in (ours, theirs)
        ]
        print(f"| {load.name} | {' | '.join(texts)} | {ratio:.2f} | {wanted} |")
    cached, cold = (
        figures["4 KiB, 16 in flight, cached", "qedfuse"],
        figures["4 KiB, 16 in flight", "storage daemon"],
    )
    ratio = statistics.median(a / b for a, b in zip(cached, cold, strict=True))
    print(f"\nqedfuse cached, against the storage daemon not cached: {ratio:.1f} (wanted: 2)")
    image.unlink()


if __name__ == "__main__":
    main()
