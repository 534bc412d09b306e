"""Random chains of images that mix QEMU's formats, and processes of qemu-nbd."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Final

from tests.support import qemu

FORMATS: Final = ("qcow2", "vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow")
"""The formats that only QEMU reads."""

_OVERLAYS: Final = ("qcow2", "qcow", "qed")
"""Formats with a backing file in any format."""

DISK_BYTES: Final = 12 << 20


def draw_bottom(path: Path, image_format: str, chance: random.Random) -> Path:
    """Make an image without a base that has random content; return its path."""
    qemu.create(path, DISK_BYTES, image_format=image_format)
    _fill(path, image_format, chance)
    return path


def draw_disk(directory: Path, image_format: str) -> tuple[Path, Path]:
    """Make an image without a base; return its path, and a raw file with its disk."""
    path = draw_bottom(directory / f"image.{image_format}", image_format, random.Random(3))
    return path, contents(path, directory)


def draw_chain(directory: Path, chance: random.Random, top: str) -> tuple[Path, Path]:
    """Make a chain whose first image has the format ``top``.

    Returns the path of this image, and a raw file with its disk as QEMU reads it.
    """
    bottom = chance.choice((*FORMATS, "raw", "qed"))
    path, found = draw_bottom(directory / f"0.{bottom}", bottom, chance), bottom
    depth = chance.randrange(3)
    for number in range(1, depth + 1):
        path, found = _overlay(directory, number, chance.choice(_OVERLAYS), path, found, chance)
    path, _ = _overlay(directory, depth + 1, top, path, found, chance)
    return path, contents(path, directory)


def _overlay(
    directory: Path, number: int, image_format: str, base: Path, found: str, chance: random.Random
) -> tuple[Path, str]:
    """Make an image over another one, with random content; return its path and its format."""
    path = directory / f"{number}.{image_format}"
    name = chance.choice((base.name, str(base)))
    # Only qcow2 stores the format of its base, and then not always.
    qemu.create(path, image_format=image_format, backing=name, backing_format=found)
    if image_format == "qcow2" and found != "raw" and chance.random() < 1 / 3:
        qemu.run("qemu-img", "rebase", "-q", "-u", "-b", name, "-F", found, path)
    _fill(path, image_format, chance)
    return path, image_format


def _fill(path: Path, image_format: str, chance: random.Random) -> None:
    """Write data and zeros at random places."""
    commands = []
    for _ in range(chance.randrange(1, 6)):
        unit = chance.choice((512, 4096, 65536))
        start = chance.randrange(DISK_BYTES // unit) * unit
        length = min(DISK_BYTES - start, unit * chance.randrange(1, 9))
        what = chance.choice((f"-P {chance.randrange(1, 256)}", "-P 5", "-z"))
        commands.append(f"write {what} {start} {length}")
    qemu.io(path, *commands, image_format=image_format)


def contents(path: Path, directory: Path) -> Path:
    """Return a raw file with what QEMU reads from the first image of a chain."""
    raw = directory / "expected.raw"
    image_format = path.suffix.removeprefix(".")
    qemu.run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, raw)
    return raw


def servers(directory: Path) -> list[int]:
    """Return the ids of the processes of qemu-nbd that have a file below a directory open."""
    found = []
    for number in processes(directory):
        try:
            if Path(f"/proc/{number}/comm").read_text("utf-8") == "qemu-nbd\n":
                found.append(number)
        except OSError:  # the process has ended
            continue
    return found


def processes(directory: Path) -> list[int]:
    """Return the ids of the processes, without this one, that have a file below a directory open.

    A program of QEMU that was left behind is found, whichever program it is.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            files = [str(link.readlink()) for link in (entry / "fd").iterdir()]
        except OSError:  # the process has ended
            continue
        if any(name.startswith(f"{directory}/") for name in files):
            found.append(int(entry.name))
    return found


def write_out(directory: Path) -> None:
    """Write the data of all files of a directory to the disk.

    Before that a file system can count space for them that it does not use in the end.
    """
    for path in directory.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


_MIXED_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "qcow2": (
        *("", "compat=0.10", "cluster_size=4096", "cluster_size=1M", "extended_l2=on"),
        *("preallocation=metadata", "lazy_refcounts=on", "compression_type=zstd"),
    ),
    "qed": ("", "cluster_size=4096,table_size=2", "cluster_size=8192", "cluster_size=1M"),
    "vmdk": ("", "subformat=streamOptimized", "subformat=monolithicFlat"),
    "vdi": ("", "static=on"),
    "vpc": ("", "force_size=on"),
    "vhdx": ("", "block_size=1M", "subformat=fixed"),
}
"""Options by which images of one format differ; formats that are missing have none."""


def draw_mixed(directory: Path, chance: random.Random, prefix: str, depth: int, top: str) -> Path:
    """Make ``depth`` images on top of each other, whose formats, sizes and options vary.

    Returns the path of the first, which has the format ``top``.  Each image names its base by a
    relative name, so that the directory can be copied.
    """
    bottom = top if depth == 1 else chance.choice((*FORMATS, "raw", "qed"))
    path, found = (
        _draw_layer(directory / f"{prefix}0.{bottom}", bottom, None, "raw", chance),
        bottom,
    )
    for number in range(1, depth):
        image_format = top if number == depth - 1 else chance.choice(_OVERLAYS)
        if found == "vmdk" and number < depth - 1 and chance.random() < 0.5:
            image_format = "vmdk"
        name = directory / f"{prefix}{number}.{image_format}"
        path, found = _draw_layer(name, image_format, path, found, chance), image_format
    return path


def _draw_layer(
    path: Path, image_format: str, base: Path | None, base_format: str, chance: random.Random
) -> Path:
    """Make an image over another one or over none, with random size and content."""
    # VHDX has whole MiB, and Parallels whole clusters.  A VMDK image has the size of its parent.
    unit = 1 << 20 if image_format in {"vhdx", "parallels"} else 512
    size = unit * chance.randrange(1, (6 << 20) // unit + 1)
    options = chance.choice(_MIXED_OPTIONS.get(image_format, ("",)))
    words: list[str | Path] = ["qemu-img", "create", "-q", "-f", image_format]
    if base is not None:
        if image_format == "vmdk" or "preallocation" in options:
            options = ""
        words += ["-b", base.name, "-F", base_format]
    words += (["-o", options] if options else []) + [path]
    qemu.run(*words, *([] if base is not None and image_format == "vmdk" else [str(size)]))
    size = qemu.info(path)["virtual-size"]
    commands = []
    for _ in range(chance.randrange(7)):
        unit = chance.choice((512, 4096, 65536, 300 * 512))
        start = chance.randrange(size // unit + 1) * unit
        length = min(size - start, unit * chance.randrange(1, 12))
        what = chance.choice((f"-P {chance.randrange(1, 256)}", "-P 5", "-P 0", "-z", "-z -u"))
        if length:
            commands.append(f"write {what} {start} {length}")
    if image_format == "qcow2" and options in {"", "cluster_size=1M"} and size >= 1 << 20:
        commands.insert(0, f"write -c -P 9 0 {1 << 20}")
    if options == "subformat=streamOptimized":
        commands = ["write -P 7 0 64k"] if size >= 1 << 16 else []
    if commands:
        qemu.io(path, *commands, image_format=image_format)
    if image_format == "raw" and chance.random() < 0.5:
        os.truncate(path, max(1, size - chance.randrange(512)))
    return path
