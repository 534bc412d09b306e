"""Reading and summarizing the persistent free list of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.state.freelistreader import read_list
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.remote.options import RemoteOptions


@dataclass(frozen=True, slots=True)
class FreeListInfo:
    """The free list of an image; all numbers are 0 if there is no valid list.

    Attributes:
        present: Whether the feature bit of the list is set.
        valid: Whether there is a valid list.
        runs: Number of runs of free clusters in the list.
        clusters: Number of free clusters in the list, including those that store the list.
        bytes: Total length in bytes of the free clusters in the list.
        list_clusters: Number of clusters that store the list itself.
        problem: Why the list is invalid, in one line; otherwise empty.
    """

    present: bool
    valid: bool = False
    runs: int = 0
    clusters: int = 0
    bytes: int = 0
    list_clusters: int = 0
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the description as values for JSON; keys that do not apply are left out."""
        value: dict[str, Any] = {"present": self.present}
        if self.present:
            value["valid"] = self.valid
        if self.valid:
            value |= {
                "runs": self.runs,
                "free-clusters": self.clusters,
                "free-bytes": self.bytes,
                "list-clusters": self.list_clusters,
            }
        elif self.present:
            value["problem"] = self.problem
        return value


async def describe_free_list(
    path: str,
    *,
    lock: LockMode | None = LockMode.READ,
    remote: RemoteOptions | None = None,
) -> FreeListInfo:
    """Read and summarize the free list of an image; the entries of L2 tables are not read.

    Args:
        path: The image, or its URL.
        lock: The mode in which to lock the image; None to take no lock.
        remote: How to read a URL; None for the defaults.

    Raises:
        QedError: The image cannot be opened, locked or read.
    """
    async with open_image(path, lock, remote or RemoteOptions()) as file:
        header = await read_header(file)
        if not header.has_free_list:
            return FreeListInfo(present=False)
        # The layer only finds the L2 tables, so its cache needs no memory.
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
            list_clusters=len(found.list_cluster_indices),
        )
