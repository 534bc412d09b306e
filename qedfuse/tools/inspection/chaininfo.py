"""Information that takes longer to read than `info`: the chain, all tables, the free list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from qedfuse.disk.lookup.backing import open_bases
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.tools.inspection.allocation import count_allocation
from qedfuse.tools.inspection.freelistinfo import describe_free_list
from qedfuse.tools.inspection.info import describe, describe_open

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.hostio.posixfile import PosixFile
    from qedfuse.tools.inspection.allocation import Allocation
    from qedfuse.tools.inspection.freelistinfo import FreeListInfo
    from qedfuse.tools.inspection.info import Format, ImageInfo


@dataclass(frozen=True, slots=True)
class Details:
    """More about an image than `ImageInfo` has.

    Attributes:
        free_list: None if the image has none.
        allocation: None if it was not asked for.
    """

    free_list: FreeListInfo | None = None
    allocation: Allocation | None = None


async def read_details(
    info: ImageInfo,
    options: OpenOptions | None = None,
    *,
    allocation: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Details:
    """Read the free list of an image if it has one, and count its clusters if wanted.

    Returns nothing about an image whose header is invalid.

    Args:
        info: The description of the image.
        options: How to open it.
        allocation: Whether to count clusters, which reads all tables.
        progress: Called with the number of L2 tables read so far and in all.

    Raises:
        QedError: The image cannot be read.
    """
    options = options or OpenOptions()
    if info.qed is None or not info.qed.readable:
        return Details()
    counted = None
    if allocation:
        with open_image_file(info.path, options.read_lock) as file:
            counted = await count_allocation(file, await read_header(file), progress)
    listed = None
    if info.qed.header.header is not None and info.qed.header.header.free_list:
        listed = await describe_free_list(info.path, share=options.force_share)
    return Details(listed, counted)


async def describe_chain(
    path: str, image_format: Format = "auto", options: OpenOptions | None = None
) -> list[ImageInfo]:
    """Describe an image and all its bases, which are opened by the rules of ``options``.

    Raises:
        BackingError: A base is missing, refused, in a loop, too deep or of another format.
        QedError: The image or a base cannot be opened.
    """
    options = options or OpenOptions()
    top = describe(path, image_format, share=options.force_share)
    if top.qed is None or not top.qed.readable:
        # The name of a base is not used if the header is invalid.
        return [top]
    with open_image_file(path, options.read_lock) as file:
        header = await read_header(file)
        layers = await open_bases(path, file, header, options, make_store(0))
        try:
            return [top, *(_describe_layer(layer) for layer in layers)]
        finally:
            for layer in layers:
                layer.file.close()


def _describe_layer(layer: Layer) -> ImageInfo:
    """Describe a base that is open."""
    file = cast("PosixFile", layer.file)
    return describe_open(file.fd, file.path, "raw" if isinstance(layer, RawLayer) else "qed")
