"""Random chains of images that mix QEMU's formats, and processes of qemu-nbd."""

from __future__ import annotations

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
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text("utf-8") == "qemu-nbd\n":
                files = [str(link.readlink()) for link in (entry / "fd").iterdir()]
                if any(name.startswith(f"{directory}/") for name in files):
                    found.append(int(entry.name))
        except OSError:  # the process has ended
            continue
    return found
