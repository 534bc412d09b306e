"""The systems that are measured, and the command that starts the server of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

System: TypeAlias = Literal["qedfuse", "qemu", "qemu-root", "baseline", "single"]
"""``qemu-root`` is the QEMU of a root directory; see `benchmarks.peerroot`.  ``single`` is
qedfuse on a single image with the content of the chain."""

PEERS: Final[tuple[System, ...]] = ("qemu", "qemu-root")
"""The systems that qedfuse competes with."""

TITLES: Final[Mapping[System, str]] = {
    "qedfuse": "qedfuse",
    "qemu": "QEMU",
    "qemu-root": "the other QEMU",
    "baseline": "baseline",
    "single": "one image",
}
"""The names of the systems in a report; the versions are added once they are known."""


class Programs(NamedTuple):
    """The commands that start the measured programs; a peer may need several words."""

    qedfuse: str
    baseline: str
    peers: Mapping[System, Sequence[str]]


class Service(NamedTuple):
    """How a server is started, and what it serves.

    Attributes:
        command: The command line.
        mountpoints: Where the server mounts.
        disks: The flat files, one for each image.
        variables: Further environment variables.
    """

    command: Sequence[str]
    mountpoints: Sequence[Path]
    disks: Sequence[Path]
    variables: Mapping[str, str]

    @property
    def mounts_files(self) -> bool:
        """Whether the mountpoints are files."""
        return self.mountpoints == self.disks


def service(
    programs: Programs, system: System, images: Sequence[Path], directory: Path, *, threads: bool
) -> Service:
    """Describe the server of a system for some images, with mountpoints below ``directory``.

    ``threads`` makes the baseline use many threads instead of one.
    """
    if system in PEERS:
        disks = [directory / f"{system}-{number}.mnt" for number in range(len(images))]
        exports = zip(images, disks, strict=True)
        words = [
            word
            for number, (image, disk) in enumerate(exports)
            for word in _export(number, image, disk)
        ]
        return Service([*programs.peers[system], *words], disks, disks, {})
    mountpoint = directory / f"{system}.mnt"
    sources = list(map(str, images))
    if system == "baseline":
        return Service(
            [programs.baseline, *sources, str(mountpoint)],
            [mountpoint],
            [mountpoint / f"disk{number}.raw" for number in range(len(images))],
            {"THREADS": "many" if threads else "one"},
        )
    disks = [mountpoint / f"{image.stem}.raw" for image in images]
    return Service([programs.qedfuse, *sources, str(mountpoint), "-f"], [mountpoint], disks, {})


def _export(number: int, image: Path, mountpoint: Path) -> list[str]:
    """Return QEMU's options for an image; all that concerns speed keeps QEMU's default."""
    file = {"driver": "file", "filename": str(image)}
    node = {"driver": "qed", "node-name": f"disk{number}", "file": file}
    export = {
        "type": "fuse",
        "id": f"export{number}",
        "node-name": f"disk{number}",
        "mountpoint": str(mountpoint),
        "writable": True,
        "growable": False,
    }
    return ["--blockdev", json.dumps(node), "--export", json.dumps(export)]
