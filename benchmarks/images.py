"""Images with the same content for all systems, and the content that a disk must have.

A stage is the state of the disk before a load:

- ``full``: every cluster is allocated and holds its own random data.
- ``part``: the same, with a quarter of the size; up to four such disks differ in content.
- ``empty``: nothing is allocated.
- ``overlay``: nothing is allocated, over a backing file that is full.
- ``hole``: 10 GiB, of which only the last cluster is allocated.
- ``chain``: a full base below seven overlays, each of which holds a random eighth of the
  clusters.

qedfuse and QEMU get a QED image each; the baseline gets a flat file.  All images are
created by QEMU's tools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.commands import run
from benchmarks.pagecache import evict_file, sync_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.cells import Stage
    from benchmarks.systems import System

CLUSTER_BYTES: Final = 65536
HOLE_BYTES: Final = 10 << 30
OVERLAY_COUNT: Final = 7
OVERLAY_FRACTION: Final = 8
"""Each overlay of the chain holds one in 8 clusters."""
CONSUMED_STAGES: Final = frozenset({"empty", "overlay"})
"""Stages that a load changes into another one, so that each measurement needs a new image."""
PART_COUNT: Final = 4
"""The number of disks of the stage ``part``, whose contents follow each other in ``full``."""
_CHUNK_BYTES: Final = 16 << 20


class Images:
    """Creates images below ``directory``.

    Their disks have ``size`` bytes, except for ``hole`` and ``part``.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size

    def expected(self, stage: Stage, number: int = 0) -> Path | None:
        """Return a flat file with the content of the disk before the load; None if all zeros.

        ``number`` is that of one of several disks, counted from 0.
        """
        if stage == "empty":
            return None
        if stage == "part":
            return self._part(number)
        if stage == "chain":
            self._chain()
            return self._directory / "chain.expected"
        if stage == "hole":
            path = self._directory / "hole.expected"
            if not path.exists():
                with path.open("wb") as file:
                    file.truncate(HOLE_BYTES)
                    file.seek(HOLE_BYTES - CLUSTER_BYTES)
                    file.write(np.random.default_rng(7).bytes(CLUSTER_BYTES))
            return path
        path = self._directory / "full.expected"
        if not path.exists():
            random = np.random.default_rng(1)
            with path.open("wb") as file:
                for length in _chunk_lengths(self._size):
                    file.write(random.bytes(length))
        return path

    def make(self, stage: Stage, system: System, number: int = 0) -> Path:
        """Return the image of a system; it is a new one each time for a consumed stage.

        ``number`` is that of one of several images, counted from 0.
        """
        flat = system == "baseline"
        name = f"{stage}-{system}-{number}" if number else f"{stage}-{system}"
        path = self._directory / f"{name}.{'flat' if flat else 'qed'}"
        if path.exists() and stage not in CONSUMED_STAGES:
            return path
        if stage == "empty":
            path.unlink(missing_ok=True)
            if flat:
                run("truncate", "--size", str(self._size), str(path))
            else:
                run("qemu-img", "create", "-q", "-f", "qed", str(path), str(self._size))
        elif stage == "overlay":
            self._overlay(path, flat=flat)
        elif stage == "chain" and system not in {"baseline", "single"}:
            self._chain()
            self._copy(self._link(OVERLAY_COUNT), path)
        else:
            source = self.expected(stage, number)
            assert source is not None
            if flat:
                self._copy(source, path)
            else:
                _convert(source, path)
        # All images must get into the page cache in the same way; see `cache_file`.
        evict_file(path)
        return path

    def copy(self, stage: Stage, system: System) -> Path:
        """Return a new copy of an image; its pages are in the page cache, and clean."""
        source = self.make(stage, system)
        path = source.with_stem(f"{source.stem}-copy")
        path.unlink(missing_ok=True)
        self._copy(source, path)
        sync_file(path)
        return path

    def files(self, stage: Stage, image: Path) -> list[Path]:
        """Return all files that reads of an image of a stage may touch."""
        if image.suffix == ".flat":
            return [image]
        if stage == "overlay":
            return [self._base(), image]
        if stage == "chain" and "single" not in image.name:
            return [self._base(), *map(self._link, range(1, OVERLAY_COUNT)), image]
        return [image]

    def disk_bytes(self, stage: Stage) -> int:
        """Return the size of the disk in bytes."""
        if stage == "hole":
            return HOLE_BYTES
        return self._size // PART_COUNT if stage == "part" else self._size

    def drop(self, stage: Stage) -> None:
        """Delete the images of a stage."""
        for path in self._directory.glob(f"{stage}-*"):
            path.unlink()

    def _part(self, number: int) -> Path:
        """Return the flat file of one of the smaller disks."""
        path = self._directory / f"part.expected-{number}"
        if not path.exists():
            full = self.expected("full")
            assert full is not None
            length = self.disk_bytes("part")
            with full.open("rb") as source, path.open("wb") as target:
                source.seek(number * length)
                for chunk in _chunk_lengths(length):
                    target.write(source.read(chunk))
        return path

    def _base(self) -> Path:
        """Return a full QED image that no load writes to."""
        path = self._directory / "base.qed"
        if not path.exists():
            source = self.expected("full")
            assert source is not None
            _convert(source, path)
        return path

    def _overlay(self, path: Path, *, flat: bool) -> None:
        """Create an overlay; the flat file is created only once, since no load consumes it."""
        if not flat:
            path.unlink(missing_ok=True)
            _create_over(self._base(), path)
        elif not path.exists():
            source = self.expected("full")
            assert source is not None
            self._copy(source, path)

    def _link(self, number: int) -> Path:
        """Return the path of an overlay of the chain; 1 is the lowest."""
        name = "top" if number == OVERLAY_COUNT else str(number)
        return self._directory / f"link-{name}.qed"

    def _chain(self) -> None:
        """Create the chain and a flat file with the same content, unless they exist."""
        flat = self._directory / "chain.expected"
        if flat.exists():
            return
        below = self._base()
        full = self.expected("full")
        assert full is not None
        building = self._directory / "building"
        self._copy(full, building)
        random = np.random.default_rng(8)
        clusters = self._size // CLUSTER_BYTES
        with building.open("r+b") as file:
            for number in range(1, OVERLAY_COUNT + 1):
                path = self._link(number)
                _create_over(below, path)
                lines = []
                for cluster in sorted(
                    random.permutation(clusters)[: clusters // OVERLAY_FRACTION].tolist()
                ):
                    value = (37 * number + cluster) % 255 + 1
                    lines.append(f"write -q -P {value} {cluster * CLUSTER_BYTES} {CLUSTER_BYTES}\n")
                    file.seek(cluster * CLUSTER_BYTES)
                    file.write(bytes([value]) * CLUSTER_BYTES)
                run("qemu-io", "-f", "qed", str(path), seconds=300, text="".join(lines))
                below = path
        building.replace(flat)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        run("cp", "--sparse=auto", str(source), str(target), seconds=300)


def _chunk_lengths(size: int) -> Iterator[int]:
    for start in range(0, size, _CHUNK_BYTES):
        yield min(_CHUNK_BYTES, size - start)


def _convert(source: Path, target: Path) -> None:
    run(
        *("qemu-img", "convert", "-f", "raw", "-O", "qed", str(source), str(target)),
        seconds=300,
    )


def _create_over(below: Path, path: Path) -> None:
    # A relative name, which is resolved from the overlay's directory.
    run("qemu-img", "create", "-q", "-f", "qed", "-b", below.name, "-F", "qed", str(path))
