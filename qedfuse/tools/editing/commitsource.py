"""The data that a commit writes into a base: from one overlay, or from all images over the base."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.errors import BackingError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.remote.address import require_local
from qedfuse.text import printable
from qedfuse.tools.editing.commitbase import BaseFile, describe_base
from qedfuse.tools.editing.ownextents import batch_starts, own_extents, refuse_bad

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.hostio.posixfile import PosixFile


class CommitSource(Protocol):
    """A disk whose stored ranges a commit writes into a base, in batches of equal length."""

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""

    def batch_starts(self) -> range:
        """Return the guest offsets at which the batches of the disk begin."""

    async def extents(self, start: int) -> list[Extent]:
        """Return how the batch that begins at ``start`` is stored, as extents in order.

        Ranges that no image stores may be missing.

        Raises:
            CorruptImageError: A table entry is bad.
            HostError: The host cannot read a table.
        """

    async def read(self, start: int, length: int) -> Buffer:
        """Read a range that is stored as data.

        Raises:
            HostError: The host cannot read a file.
        """


class OverlayAlone:
    """The data of one image, without its bases."""

    def __init__(self, disk: Disk) -> None:
        """Take the open image ``disk``, whose own ranges will be committed."""
        self._disk = disk

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._disk.size

    def batch_starts(self) -> range:
        """Return the guest offsets at which the batches of the disk begin."""
        return batch_starts(self._disk.size, self._disk.header.geometry.cluster_size)

    async def extents(self, start: int) -> list[Extent]:
        """Return how the image stores a batch; see `CommitSource.extents`."""
        return await own_extents(self._disk, start)

    async def read(self, start: int, length: int) -> Buffer:
        """Read a range that the image stores as data."""
        return await self._disk.read(start, length)


class UpperImages:
    """The data of all images over a base; the first image is the one at the top of the chain.

    Attributes:
        file_bytes: Length of the first image's file in bytes.
    """

    def __init__(self, chain: Chain, file: PosixFile) -> None:
        """Take the images whose ranges will be committed.

        Args:
            chain: The images over the base, without the base.
            file: The file of the first image.
        """
        self._chain = chain
        self._top = cast("QedLayer", chain.layers[0])
        self.file_bytes = file.size()

    @property
    def size(self) -> int:
        """The size of the first image's disk in bytes."""
        return self._top.size

    def batch_starts(self) -> range:
        """Return the guest offsets at which the batches of the disk begin."""
        return batch_starts(self.size, self._top.geometry.cluster_size)

    async def extents(self, start: int) -> list[Extent]:
        """Return how the images together store a batch; see `CommitSource.extents`."""
        length = min(self.batch_starts().step, self.size - start)
        extents = await self._chain.stored(start, length)
        refuse_bad(extents)
        return extents

    async def read(self, start: int, length: int) -> Buffer:
        """Read a range that the images store as data."""
        return await self._chain.read(start, length)


@asynccontextmanager
async def open_upper_images(
    path: str, base: str, options: OpenOptions
) -> AsyncIterator[tuple[UpperImages, BaseFile]]:
    """Open all images over a base read-only; yield the images and a description of the base's file.

    The images are locked if ``options.lock`` is set.  The base and the images below it are closed
    before the caller's ``with`` block begins.

    Args:
        path: The image at the top of the chain.
        base: A file of the chain.  The name may be relative to the directory of the image that
            names the file, or to the working directory of ``options``.
        options: How to open the chain.

    Raises:
        UsageError: The base is a URL, or an image that QEMU serves.
        BackingError: The chain has no such file, or cannot be used, or the file is refused by
            `describe_base`.
        QedError: An image cannot be opened or locked.
    """
    lock = LockMode.READ if options.lock else None
    with open_image_file(path, lock) as file:
        header, store = await read_header(file), make_store(options.cache_bytes)
        top = QedLayer(file, header, store)
        await top.scan_l1()
        with closing_layers(await open_bases(path, file, header, options, store)) as layers:
            depth = _depth_of(path, base, layers, options.backing.working_directory)
            require_local(layers[depth - 1].file.path)
            above = top if depth == 1 else cast("QedLayer", layers[depth - 2])
            base_file = await describe_base(
                layers[depth - 1], above.file, above.header, options.backing, depth
            )
            # The read lock of the base would conflict with opening it for writing, and only the
            # base needs the layers below it.
            for layer in layers[depth - 1 :]:
                layer.file.close()
            del layers[depth - 1 :]
            yield UpperImages(Chain([top, *layers]), file), base_file


def _depth_of(path: str, base: str, layers: Sequence[Layer], directory: str) -> int:
    """Return the depth of the file ``base`` in a chain, where the first image has depth 0.

    The name may be relative to ``directory``, or to the directory of the image that names the file.
    """
    above = path
    for depth, layer in enumerate(layers, 1):
        file = cast("PosixFile", layer.file)
        in_directory = os.path.join(directory, base.removeprefix("file:"))  # noqa: PTH118  no I/O
        for candidate in (backing_path(above, base, directory), in_directory):
            if _is_file(candidate, file.stat()):
                return depth
        above = file.path
    chain = ", ".join(layer.file.name for layer in layers) or "none"
    msg = (
        f"{printable(path)}: backing file {printable(base)}: found no such file in the chain, "
        f"expected one of: {chain}"
    )
    raise BackingError(msg)


def _is_file(path: str, expected: os.stat_result) -> bool:
    """Return whether a path leads to the file with the attributes ``expected``."""
    try:
        return os.path.samestat(os.stat(path), expected)  # noqa: PTH116
    except OSError:
        return False
