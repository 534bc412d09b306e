"""What the toolbox is measured on: images of 1 TiB that take up little, and disks of real data.

- ``full``: every cluster of a large disk is allocated; runs of 16 follow each other in the
  file.  Its data are holes of the host's file, its tables are real.
- ``scattered``: the same, but no cluster follows its neighbour.
- ``mixed``: random data, zeros that are written out, and holes, in runs of 1 to 32 clusters;
  as a flat file and as a QED image, in which some of the zeros are entries of the table.
- ``chain``: three overlays over ``mixed``, each with runs of its own all over the disk.

The flat files beside them are what the disks must read as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.servers import run
from benchmarks.sparse import GEOMETRY, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER_BYTES: Final = GEOMETRY.cluster_size
MAX_RUN_CLUSTERS: Final = 32
"""Clusters in a run of ``mixed``, at the most."""
OVERLAY_COUNT: Final = 3
FULL_RUN_CLUSTERS: Final = 16


class Files:
    """Makes the files below a directory, each when it is first asked for.

    Attributes:
        directory: Where they are.
        size: Bytes of the disks with data.
        large: Bytes of the disks without.
    """

    def __init__(self, directory: Path, size: int, large: int) -> None:
        self.directory: Final = directory
        self.size: Final = size
        self.large: Final = large

    def path(self, name: str) -> Path:
        """Give a file by its name: ``full.qed``, ``mixed.raw``; one that is not made as it is."""
        path = self.directory / name
        maker = {
            "full.qed": self._full,
            "scattered.qed": self._full,
            "mixed.raw": self._mixed,
            "mixed.qed": self._mixed,
            "chain.qed": self._chain,
            "chain.raw": self._chain,
        }.get(name)
        if maker is not None and not path.exists():
            maker(path)
        return path

    def _full(self, path: Path) -> None:
        run_length = 1 if path.stem == "scattered" else FULL_RUN_CLUSTERS
        build(path, self.large, GEOMETRY.clusters(self.large), run=run_length)

    def _mixed(self, _path: Path) -> None:
        """Make the flat file, have QEMU make an image of it, and write zeros of both kinds."""
        random = np.random.default_rng(3)
        flat, image = self.directory / "mixed.raw", self.directory / "mixed.qed"
        zeros = []
        with flat.open("wb") as file:
            file.truncate(self.size)
            for start, length in runs(self.size // CLUSTER_BYTES, random):
                kind = random.choice(["data", "data", "zeros", "hole"])
                file.seek(start * CLUSTER_BYTES)
                if kind == "data":
                    file.write(random.bytes(length * CLUSTER_BYTES))
                elif kind == "zeros":
                    file.write(bytes(length * CLUSTER_BYTES))
                    how = random.choice(["-P 0", "-z"])
                    zeros.append(
                        f"write -q {how} {start * CLUSTER_BYTES} {length * CLUSTER_BYTES}\n"
                    )
        run("qemu-img", "convert", "-f", "raw", "-O", "qed", str(flat), str(image), seconds=300)
        run("qemu-io", "-f", "qed", str(image), seconds=300, text="".join(zeros))

    def _chain(self, _path: Path) -> None:
        """Lay overlays over ``mixed``, and make the same changes to a copy of the flat file."""
        random = np.random.default_rng(4)
        below, source = self.path("mixed.qed"), self.path("mixed.raw")
        flat = self.directory / "chain.raw"
        run("cp", "--sparse=always", str(source), str(flat), seconds=300)
        with flat.open("r+b") as file:
            for number in range(1, OVERLAY_COUNT + 1):
                name = "chain.qed" if number == OVERLAY_COUNT else f"chain-{number}.qed"
                path = self.directory / name
                create = ("qemu-img", "create", "-q", "-f", "qed", "-F", "qed")
                run(*create, "-b", below.name, str(path))
                lines = []
                for start, length in runs(self.size // CLUSTER_BYTES, random):
                    value = int(random.integers(0, 256)) if random.random() < 1 / 4 else None
                    if value is None:
                        continue
                    how = f"-P {value}" if value % 8 else "-z"
                    lines.append(
                        f"write -q {how} {start * CLUSTER_BYTES} {length * CLUSTER_BYTES}\n"
                    )
                    file.seek(start * CLUSTER_BYTES)
                    file.write(bytes([value if value % 8 else 0]) * (length * CLUSTER_BYTES))
                run("qemu-io", "-f", "qed", str(path), seconds=300, text="".join(lines))
                below = path


def runs(clusters: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Cut a disk into runs: first cluster and length of each."""
    start = 0
    while start < clusters:
        length = min(int(random.integers(1, MAX_RUN_CLUSTERS + 1)), clusters - start)
        yield start, length
        start += length
