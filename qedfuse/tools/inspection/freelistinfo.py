"""What an image says about its free clusters: the persistent free list, read and summed up."""

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
    """What an image says about its free clusters.

    Attributes:
        present: Whether the feature bit is set, so that older programs refuse the image.
        valid: Whether there is a list that can be believed.
        runs: How many runs of clusters it has.
        clusters: How many clusters are free.
        bytes: How many bytes of the file that is.
        list_clusters: How many of them hold the list.
        problem: Why the list is not valid, in one line; empty if it is, or if there is none.
    """

    present: bool
    valid: bool = False
    runs: int = 0
    clusters: int = 0
    bytes: int = 0
    list_clusters: int = 0
    problem: str = ""


async def describe_free_list(path: str, *, share: bool = False) -> FreeListInfo:
    """Look at the list of an image; whether a table entry contradicts it, the check tells.

    With ``share`` it is read beside a program that writes to the image.

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
