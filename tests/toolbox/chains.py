"""Chains of images drawn at random from a seed, written by QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support import qemu

if TYPE_CHECKING:
    import random
    from pathlib import Path

MOST_BYTES: Final = 1 << 21
"""Longest write, so that large clusters do not make large files."""


def random_raw(path: Path, chance: random.Random) -> None:
    """Make a raw file with holes, whose length need not be whole sectors."""
    size = chance.choice([0, 1, 511, 4096]) + chance.randrange(0, 1 << 22)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(chance.randrange(6)):
            at = chance.randrange(size + 1)
            file.seek(at)
            file.write(chance.randbytes(min(size - at, chance.choice([1, 4096, 100_000]))))


def random_image(path: Path, chance: random.Random, base: Path | None = None) -> None:
    """Make an image of any geometry, over a base or none, with data and zeros in places.

    QEMU opens no image whose tables have one cluster.
    """
    cluster_size = 1 << chance.randrange(12, 22)
    table_size = min(1 << chance.randrange(1, 5), max(2, (1 << 24) // cluster_size))
    size = chance.choice([chance.randrange(1, 1 << 22), chance.randrange(1, 1 << 28)])
    options = {} if base is None else {"backing": base.name, "backing_format": base.suffix[1:]}
    qemu.create(path, size, cluster_size=cluster_size, table_size=table_size, **options)
    size = -(-size // 512) * 512
    commands = []
    for _ in range(chance.randrange(9)):
        at = chance.randrange(size // 512) * 512 % chance.choice([size, 1 << 22])
        length = chance.choice([512, 4096, cluster_size, 3 * cluster_size, 1 << 20])
        length = min(length, size - at, MOST_BYTES)
        what = chance.choice(["-P 7", "-P 9", "-P 0", "-z"])
        commands.append(f"write {what} {at} {length}")
    if commands:
        qemu.io(path, *commands)


def random_chain(directory: Path, chance: random.Random) -> list[Path]:
    """Make a chain of up to four files, the last of them raw or not; the top one comes first."""
    files: list[Path] = []
    if chance.randrange(2):
        files.append(directory / "bottom.raw")
        random_raw(files[0], chance)
    for number in range(chance.randrange(1, 4)):
        path = directory / f"image{number}.qed"
        random_image(path, chance, files[0] if files else None)
        files.insert(0, path)
    return files
