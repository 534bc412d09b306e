"""Reading and summarizing the persistent free list of an image."""

from __future__ import annotations

from dataclasses import dataclass

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.state.freelistreader import read_list
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode


@dataclass(frozen=True, slots=True)
class FreeListInfo:
    """The free list of an image.

    Attributes:
        present: Whether the feature bit is set, with which QEMU refuses the image.
        valid: Whether there is a list, and it is valid.
        runs: Number of runs of free clusters.
        clusters: Number of free clusters.
        bytes: Bytes of the file in free clusters.
        list_clusters: Number of free clusters that store the list.
        problem: Why the list is invalid, in one line; empty if it is valid, or if there is
            none.
    """

    present: bool
    valid: bool = False
    runs: int = 0
    clusters: int = 0
    bytes: int = 0
    list_clusters: int = 0
    problem: str = ""


async def describe_free_list(path: str, *, share: bool = False) -> FreeListInfo:
    """Read the free list of an image; only a check compares it with the table entries.

    Args:
        path: The image.
        share: Allow that another program writes to it.

    Raises:
        QedError: The image cannot be opened, locked or read.
    """
    with open_image_file(path, LockMode.to_read(share=share)) as file:
        header = await read_header(file)
        if not header.free_list:
            return FreeListInfo(present=False)
        layer = QedLayer(file, header, make_store(0))
        await layer.scan_l1()
        try:
            found = await read_list(file, header, layer.l2_tables)
        except CorruptImageError as error:
            return FreeListInfo(present=True, problem=str(error))
        return FreeListInfo(
            present=True,
            valid=True,
            runs=len(found.runs),
            clusters=found.clusters,
            bytes=found.clusters * header.cluster_size,
            list_clusters=len(found.holding_clusters),
        )
