"""Writing a persistent free list, and erasing its descriptor (docs/format-extensions.md)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.state.freelistruns import expand_runs
from qedfuse.errors import UsageError
from qedfuse.ondisk.freelist import (
    DESCRIPTOR_BYTES,
    DESCRIPTOR_END,
    DESCRIPTOR_OFFSET,
    Descriptor,
    backing_name_covers_descriptor,
    build_cluster,
    build_descriptor,
    can_be_replaced,
    encode_runs,
    runs_in_cluster,
)
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.freelist import Runs
    from qedfuse.ondisk.header import Header


class DescriptorEraser:
    """Erases the descriptor of the list that an image had when it was opened.

    Attributes:
        has_descriptor: Whether the image had a list when it was opened, and `erase` has not
            succeeded yet.
    """

    def __init__(
        self, file: HostFile, header_store: HeaderStore, writeback: MetadataWriteback
    ) -> None:
        """Prepare to erase the descriptor of the list that the header announces now, if any."""
        self._file = file
        self._header_store = header_store
        self._writeback = writeback
        self.has_descriptor = header_store.value.has_free_list

    async def erase(self) -> None:
        """Erase the descriptor; do nothing if `has_descriptor` is False.

        The caller must first clear the header's bit for the list durably.  The erasing itself need
        not be durable, because without the bit no program reads the descriptor.

        Raises:
            HostError: A system call failed.
        """
        if self.has_descriptor:
            await erase_descriptor(self._file, self._header_store.value)
            self._writeback.note_write()
            self.has_descriptor = False


async def refuse_occupied_descriptor(file: HostFile, header: Header) -> None:
    """Raise if a new descriptor would overwrite the backing file name or unknown data.

    If the header's bit says that the image has a list, there is already a descriptor.  It may be
    overwritten, so only the position of the backing file name is examined.

    Raises:
        UsageError: The backing file name or unknown data lie in the descriptor's sector.
        HostError: The host cannot read the file.
    """
    where = f"bytes {DESCRIPTOR_OFFSET} to {DESCRIPTOR_END - 1} of the header's cluster"
    found = ""
    if backing_name_covers_descriptor(header):
        found = "the backing file name"
    elif not header.has_free_list and not can_be_replaced(
        await file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES)
    ):
        # Another program, which does not know the list, may have put its own data there.
        found = "unknown data"
    if found:
        msg = f"{file.name}: free list: found {found} in {where}, expected unused bytes"
        raise UsageError(msg)


async def write_list(file: HostFile, header: Header, runs: Runs) -> None:
    """Write a list and its descriptor.

    The caller must set the header's bit for the list only after a datasync that covers all writes
    of this function.  Their order does not matter, because no program reads the list while the bit
    is clear.

    The list lies in the lowest free clusters, so the file does not become longer.  The free
    clusters suffice, because each run has at least one cluster, and a list cluster holds many runs.

    Args:
        file: The image, which must end where its last cluster in use ends.
        header: The image's header, with the bit clear.
        runs: The free clusters as ascending runs: at least one, at most `MAX_RUNS`.

    Raises:
        HostError: A system call failed; the image is sound, and has no list.
    """
    runs_per_cluster = runs_in_cluster(header.cluster_size)
    clusters = _lowest(runs, -(-len(runs) // runs_per_cluster))
    offsets = [*(clusters << np.uint64(header.geometry.cluster_bits)).tolist(), 0]
    pace = Pace()
    for index, offset in enumerate(offsets[:-1]):
        cluster_runs = runs[index * runs_per_cluster : (index + 1) * runs_per_cluster]
        await file.pwrite(offset, build_cluster(offsets[index + 1], cluster_runs))
        await pace.step()
    descriptor = Descriptor(
        first_cluster=offsets[0],
        list_clusters=len(clusters),
        runs=len(runs),
        free_clusters=int(runs[:, 1].sum()),
        file_bytes=file.size(),
        list_crc=zlib.crc32(encode_runs(runs)),
    )
    await file.pwrite(DESCRIPTOR_OFFSET, build_descriptor(descriptor))


def _lowest(runs: Runs, count: int) -> NDArray[np.uint64]:
    """Return the lowest ``count`` clusters of ascending runs, which must have that many."""
    lowest = runs[:count].copy()
    np.minimum(lowest[:, 1], np.uint64(count), out=lowest[:, 1])
    return expand_runs(lowest)[:count]


async def erase_descriptor(file: HostFile, header: Header) -> None:
    """Overwrite the descriptor of an invalid list with zeros, as an additional safeguard.

    If the backing file name lies there, nothing is written.

    A crash may lose this write.  Even then the old descriptor is not used, because programs set the
    header's bit only after a datasync that covers a new descriptor.

    Raises:
        HostError: A system call failed.
    """
    if not backing_name_covers_descriptor(header):
        await file.pwrite(DESCRIPTOR_OFFSET, bytes(DESCRIPTOR_BYTES))
