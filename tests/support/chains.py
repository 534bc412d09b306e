"""Chains of images that QEMU made, drawn at random; and a host that fails halfway."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import HostError
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

MOST_BYTES: Final = 6 << 20
"""Largest disk of a chain."""

_UNITS: Final = (512, 4096, 65536, 300 * 512)


def draw_size(chance: random.Random) -> int:
    """Draw the size of a disk in bytes, a multiple of 512."""
    return 512 * chance.randrange(MOST_BYTES // 8 // 512, MOST_BYTES // 512)


def fill(path: Path, size: int, chance: random.Random, image_format: str = "qed") -> None:
    """Have QEMU write bytes, zeros as data and zeros as zero clusters to a disk."""
    commands = []
    for _ in range(chance.randrange(3, 14)):
        unit = chance.choice(_UNITS)
        start = chance.randrange(size // unit) * unit
        length = min(size - start, unit * chance.randrange(1, 12))
        what = chance.choice((f"-P {chance.randrange(1, 256)}", "-P 7", "-P 0", "-z", "-z -u"))
        commands.append(f"write {what} {start} {length}")
    qemu.io(path, *commands, image_format=image_format)


def draw_raw(path: Path, chance: random.Random) -> Path:
    """Make a raw file with holes in it."""
    size = draw_size(chance)
    with path.open("wb") as file:
        file.truncate(size)
    fill(path, size, chance, "raw")
    return path


def draw_image(
    path: Path, chance: random.Random, backing: Path | None = None, size: int | None = None
) -> Path:
    """Make an image, of some geometry, and perhaps over a base in the same directory."""
    size = size or draw_size(chance)
    qemu.create(
        path,
        size,
        # It cannot open what it makes with tables of one cluster, until they hold something.
        cluster_size=1 << chance.randrange(12, 21),
        table_size=1 << chance.randrange(1, 5),
        backing=backing and backing.name,
        backing_format=kind(backing) if backing else "qed",
    )
    fill(path, size, chance)
    return path


def draw_chain(directory: Path, chance: random.Random, prefix: str, depth: int) -> Path:
    """Make ``depth`` images over each other, the lowest raw now and then; give the top."""
    top = None
    for level in range(depth):
        name = directory / f"{prefix}{level}"
        if level == 0 and chance.random() < 0.3:
            top = draw_raw(name.with_suffix(".raw"), chance)
        else:
            top = draw_image(name.with_suffix(".qed"), chance, top)
    assert top is not None
    return top


def kind(path: Path) -> str:
    """Give the format of a file of these chains."""
    return path.suffix[1:]


def content(path: Path) -> bytes:
    """Read a disk both through QEMU and through ours, which must agree."""
    found = qemu.content(path, image_format=kind(path))
    if kind(path) == "qed":
        assert trio.run(_read, path) == found
    return found


async def _read(path: Path) -> bytes:
    """Read a disk in pieces of an odd length."""
    options = OpenOptions(backing=BackingPolicy("any"))
    async with open_disk(str(path), options) as disk:
        parts = [await disk.read(at, 777_777) for at in range(0, disk.size, 777_777)]
    return b"".join(parts)


class Changes:
    """Counts the changes that are made to host files, and fails one of them.

    Attributes:
        count: How many there were.
    """

    def __init__(self, when: int, *, lasting: bool) -> None:
        """Fail change number ``when``, from 1, and with ``lasting`` all that follow."""
        self.count = 0
        self._when = when
        self._lasting = lasting

    def fails(self) -> bool:
        """Count one more; tell whether it fails."""
        self.count += 1
        return self.count == self._when or (self._lasting and 0 < self._when < self.count)


@contextmanager
def failing(when: int, *, lasting: bool = False) -> Iterator[Changes]:
    """Have the host refuse the change number ``when`` of any file inside the block."""
    changes = Changes(when, lasting=lasting)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pwrite", "truncate", "datasync", "punch"):
            patch.setattr(PosixFile, name, _asking(changes, getattr(PosixFile, name)))
        # What must not wait for anything is done by the calls above.
        for name in ("write_now", "grow_now"):
            patch.setattr(PosixFile, name, lambda *_: False)
        yield changes


def _asking(changes: Changes, method: Any) -> Any:  # noqa: ANN401  any method of a file
    """Put a failure in front of a method."""

    async def call(file: PosixFile, *arguments: Any) -> None:  # noqa: ANN401
        if changes.fails():
            msg = f"{file.name}: the test's host refuses"
            raise HostError(msg)
        await method(file, *arguments)

    return call
