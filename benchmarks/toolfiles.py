"""The images for the toolbox's benchmarks: sparse images of 1 TiB, and disks with real data.

- ``full``: every cluster of a large disk is allocated, in runs of 16 clusters that are
  adjacent in the file.  Its data clusters are holes of the host's file, its tables are real.
- ``scattered``: the same, but no two neighbours are adjacent in the file.
- ``mixed``: random data, written zeros, and holes, in runs of 1 to 32 clusters; as a flat
  file and as a QED image, in which some of the zeros are zero clusters.
- ``chain``: three overlays over ``mixed``, each with runs in all parts of the disk.

Beside each image is a flat file with the content of its disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.commands import run
from benchmarks.sparse import GEOMETRY, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER_BYTES: Final = GEOMETRY.cluster_size
MAX_RUN_CLUSTERS: Final = 32
"""The longest run of ``mixed``."""
OVERLAY_COUNT: Final = 3
FULL_RUN_CLUSTERS: Final = 16


class Files:
    """Creates the files below a directory, each at its first use.

    Attributes:
        directory: The directory.
        size: The size in bytes of the disks with data.
        large: The size in bytes of the sparse disks.
    """

    def __init__(self, directory: Path, size: int, large: int) -> None:
        self.directory: Final = directory
        self.size: Final = size
        self.large: Final = large

    def path(self, name: str) -> Path:
        """Return the path of a file such as ``full.qed`` or ``mixed.raw``, created if needed."""
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
        """Create the flat file, convert it with QEMU, and write zeros of both kinds."""
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
        """Create overlays over ``mixed``, and make the same changes to a copy of the flat file."""
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
    """Divide a disk into runs of random length; yield the first cluster and the length."""
    start = 0
    while start < clusters:
        length = min(int(random.integers(1, MAX_RUN_CLUSTERS + 1)), clusters - start)
        yield start, length
        start += length
