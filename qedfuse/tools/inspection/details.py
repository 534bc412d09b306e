"""The free list of an image, and how many tables and clusters the image has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.tables import read_l1_table
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError, RemoteError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ZERO
from qedfuse.tools.inspection.freelistinfo import FreeListInfo, describe_free_list

if TYPE_CHECKING:
    from qedfuse.check.findings import Code
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.inspection.info import ImageInfo
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many tables and clusters an image stores.

    Attributes:
        l2_tables: Number of valid L1 entries that point to a table.
        bad_tables: Number of L1 entries that are invalid.
        data: Number of clusters whose L2 entry is an offset, valid or not.
        zero: Number of zero clusters, which read as zeros even if the base has data there.
    """

    l2_tables: int
    bad_tables: int
    data: int
    zero: int


@dataclass(frozen=True, slots=True)
class Details:
    """The properties of an image that `ImageInfo` does not have.

    Attributes:
        free_list: The persistent free list; None if the image has none.
        allocation: How many tables and clusters there are; None if they were not counted.
    """

    free_list: FreeListInfo | None = None
    allocation: Allocation | None = None


async def read_details(
    info: ImageInfo,
    options: OpenOptions | None = None,
    *,
    allocation: bool = False,
    progress: Progress | None = None,
) -> Details:
    """Read the free list of an image, if there is one; on request, count the image's clusters.

    The result is empty for a file that is not a QED image, and for an image whose header is
    invalid.

    Args:
        info: The description of the image.
        options: How to open the image; None for the defaults.
        allocation: Whether to count clusters; this takes a read of all tables.
        progress: Called with the number of L2 tables read so far and in all.

    Raises:
        NeedsCheckError: ``allocation`` is True, and the image has more than
            `qedfuse.check.tables.MAX_TABLES` tables.
        QedError: The image cannot be opened, locked or read.  But if the host refuses to open or
            read a local image for its free list, `Details.free_list` has the error.
    """
    options = options or OpenOptions()
    if info.qed is None or not info.qed.readable:
        return Details()
    counted = None
    if allocation:
        async with open_image(info.path, options.read_lock, options.remote) as file:
            counted = await count_allocation(file, await read_header(file), progress)
    listed = None
    if info.qed.header.header is not None and info.qed.header.header.has_free_list:
        try:
            listed = await describe_free_list(
                info.path, lock=options.read_lock, remote=options.remote
            )
        except RemoteError:
            raise
        except HostError as error:
            # The rest of the description is useful without the list.
            listed = FreeListInfo(present=True, problem=str(error))
    return Details(listed, counted)


async def count_allocation(
    file: HostFile, header: Header, progress: Progress | None = None
) -> Allocation:
    """Read all tables and count their entries.

    Args:
        file: The image.
        header: The header of the image.
        progress: Called with the number of L2 tables read so far and in all.

    Raises:
        NeedsCheckError: The image has more than `qedfuse.check.tables.MAX_TABLES` tables.
        HostError: The host cannot read the file.
    """
    bad = 0

    def count_bad(_code: Code, _first: int, _values: Values, mask: Mask) -> None:
        nonlocal bad
        bad += int(mask.sum())

    classifier = EntryClassifier(header, file.size())
    _indices, tables = await read_l1_table(file, classifier, count_bad)
    data = zero = 0
    for number, table in enumerate(tables.tolist()):
        async for _first, values in read_table(file, table, header.geometry.table_bytes):
            data += int((values > ZERO).sum())
            zero += int((values == ZERO).sum())
        if progress is not None:
            progress(number + 1, len(tables))
    return Allocation(len(tables), bad, data, zero)
