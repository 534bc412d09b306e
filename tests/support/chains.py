"""Random chains of images, made by QEMU, and a host that fails at a chosen change."""

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
    from collections.abc import Callable, Iterator
    from pathlib import Path

MAX_DISK_BYTES: Final = 6 << 20
"""The largest disk that `draw_size` returns: tests read such disks completely."""
_MAX_WRITE_BYTES: Final = 1 << 21
"""The longest write, so that large clusters do not make large files."""
_MAX_TABLE_BYTES: Final = 1 << 24

_WRITE_UNITS_BYTES: Final = (512, 4096, 65536, 300 * 512, 1 << 20)


def draw_size(chance: random.Random) -> int:
    """Draw the size of a disk in bytes, a multiple of 512."""
    return 512 * chance.randrange(MAX_DISK_BYTES // 8 // 512, MAX_DISK_BYTES // 512)


def draw_any_size(chance: random.Random) -> int:
    """Draw the size of a disk in bytes, from empty to 256 MiB, not always whole sectors."""
    small = chance.choice((0, 1, 511, 4096)) + chance.randrange(1 << 22)
    return chance.choice((small, chance.randrange(1, 1 << 28)))


def _fill(
    path: Path, size: int, chance: random.Random, image_format: str = "qed", unit: int = 512
) -> None:
    """Write data, zeros as data and zeros as zero clusters to a disk, through QEMU.

    Only whole sectors are written.  Some writes are aligned to ``unit``, in bytes.
    """
    size -= size % 512
    commands = []
    for _ in range(chance.randrange(14) if size else 0):
        unit = chance.choice((*_WRITE_UNITS_BYTES, unit))
        start = chance.randrange(max(1, size // unit)) * unit % chance.choice((size, 1 << 22))
        length = min(size - start, unit * chance.randrange(1, 12), _MAX_WRITE_BYTES)
        what = chance.choice((f"-P {chance.randrange(1, 256)}", "-P 7", "-P 0", "-z", "-z -u"))
        commands.append(f"write {what} {start} {length}")
    if commands:
        qemu.io(path, *commands, image_format=image_format)


def draw_raw(
    path: Path, chance: random.Random, size_of: Callable[[random.Random], int] = draw_size
) -> Path:
    """Make a raw file with holes and with data at unaligned offsets; return its path."""
    size = size_of(chance)
    with path.open("wb") as file:
        file.truncate(size)
    _fill(path, size, chance, "raw")
    with path.open("r+b") as file:
        for _ in range(chance.randrange(4)):
            at = chance.randrange(size + 1)
            file.seek(at)
            file.write(chance.randbytes(min(size - at, chance.choice((1, 4096, 100_000)))))
    return path


def draw_image(
    path: Path,
    chance: random.Random,
    backing: Path | None = None,
    size_of: Callable[[random.Random], int] = draw_size,
) -> Path:
    """Make an image of random geometry, over a base in the same directory if one is given."""
    size = -(-size_of(chance) // 512) * 512
    cluster_size = 1 << chance.randrange(12, 22)
    # QEMU cannot open its own images with tables of one cluster while they are empty.
    table_size = min(1 << chance.randrange(1, 5), _MAX_TABLE_BYTES // cluster_size)
    qemu.create(
        path,
        size,
        cluster_size=cluster_size,
        table_size=table_size,
        backing=backing and backing.name,
        backing_format=kind(backing) if backing else "qed",
    )
    _fill(path, size, chance, unit=cluster_size)
    return path


def draw_chain(
    directory: Path,
    chance: random.Random,
    prefix: str,
    depth: int,
    size_of: Callable[[random.Random], int] = draw_size,
) -> Path:
    """Make ``depth`` images on top of each other, the lowest sometimes raw; return the top."""
    top = None
    for level in range(depth):
        name = directory / f"{prefix}{level}"
        if level == 0 and chance.random() < 0.4:
            top = draw_raw(name.with_suffix(".raw"), chance, size_of)
        else:
            top = draw_image(name.with_suffix(".qed"), chance, top, size_of)
    assert top is not None
    return top


def kind(path: Path) -> str:
    """Return the format of a file of these chains, ``qed`` or ``raw``."""
    return path.suffix[1:]


def content(path: Path) -> bytes:
    """Return the content of a disk, read through QEMU and through qedfuse, which must agree."""
    found = qemu.content(path, image_format=kind(path))
    if kind(path) == "qed":
        assert trio.run(_read, path) == found
    return found


def assert_like_qemus(found: bytes, expected: bytes, under: bytes, *, has_base: bool) -> None:
    """Compare a base after ``qemu-img commit`` with its expected content.

    ``under`` is its content before.  If it has a base itself, a known difference is allowed:
    when qemu-img writes a part of a zero cluster, the rest shows the bytes of the base again.
    """
    assert len(found) == len(expected)
    for at in range(0, len(found), 512):
        if found[at : at + 512] != expected[at : at + 512]:
            assert has_base
            assert not any(under[at : at + 512] + expected[at : at + 512])


async def _read(path: Path) -> bytes:
    """Return the content of a disk, read in parts of an odd length."""
    options = OpenOptions(backing=BackingPolicy("any"))
    async with open_disk(str(path), options) as disk:
        parts = [await disk.read(at, 777_777) for at in range(0, disk.size, 777_777)]
    return b"".join(parts)


class ChangeCounter:
    """Counts the changes to host files, and decides which of them fail.

    Attributes:
        count: How many changes there were.
        struck: How many of them failed.
    """

    def __init__(self, when: int, *, lasting: bool) -> None:
        """Fail change number ``when``, from 1, and all later ones if ``lasting``; 0 is none."""
        self.count = 0
        self.struck = 0
        self._when = when
        self._lasting = lasting

    def fails(self) -> bool:
        """Count one more change, and return whether it fails."""
        self.count += 1
        fails = self.count == self._when or (self._lasting and 0 < self._when < self.count)
        self.struck += fails
        return fails


@contextmanager
def failing(when: int, *, lasting: bool = False) -> Iterator[ChangeCounter]:
    """Let the host refuse change number ``when``, from 1, of any file inside the block."""
    changes = ChangeCounter(when, lasting=lasting)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pwrite", "truncate", "datasync", "punch"):
            patch.setattr(PosixFile, name, _asking(changes, getattr(PosixFile, name)))
        # Changes that must not block are made by the calls above instead.
        for name in ("try_write", "try_grow"):
            patch.setattr(PosixFile, name, lambda *_: False)
        yield changes


def _asking(changes: ChangeCounter, method: Any) -> Any:  # noqa: ANN401  any method of a file
    """Return a method that fails if ``changes`` says so, and otherwise calls ``method``."""

    async def call(file: PosixFile, *arguments: Any) -> None:  # noqa: ANN401
        if changes.fails():
            msg = f"{file.name}: the test's host refuses"
            raise HostError(msg)
        await method(file, *arguments)

    return call
