"""Describing an image and all its bases."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.foreignopening import foreign_disk, graph_of
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.foreign.virtualsize import virtual_size
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.regular import allocated_bytes
from qedfuse.remote.address import is_url
from qedfuse.tools.common.formatprobe import foreign_driver_of
from qedfuse.tools.inspection.imagereader import DescriptorReader, FileReader
from qedfuse.tools.inspection.info import ForeignInfo, ImageInfo, describe, describe_open
from qedfuse.tools.inspection.nameresolution import resolve_name
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.foreign.graph import ChainImage
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.remote.address import Address
    from qedfuse.tools.common.formatprobe import FormatChoice


async def describe_any(
    path: str, image_format: FormatChoice = "auto", options: OpenOptions | None = None
) -> ImageInfo:
    """Return the description of a local file in any format, or of a URL of a QED or raw image.

    Args:
        path: The file, or the URL.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the file; None for the defaults.

    Raises:
        NotQedError: ``image_format`` is ``qed`` and the file has no QED magic.  Or it is ``auto``,
            and ``path`` is a URL of an image in another format than QED and raw.
        ForeignError: The file is of a format that QEMU reads, and QEMU fails or is missing.
        QedError: The file cannot be opened, locked or read.
    """
    options = options or OpenOptions()
    driver = foreign_driver_of(path) if image_format == "auto" else None
    if driver is not None:
        with open_image_file(path, options.read_lock) as image:
            async with foreign_disk(image, driver, options) as disk:
                return _describe_image(disk.graph.images[0], disk.size())
    if not is_url(path):
        return describe(path, image_format, lock=options.read_lock, allowed=options.remote.allowed)
    async with open_image(path, None, options.remote) as file:
        return await _describe_file(file, path, image_format, options.remote.allowed)


async def describe_chain(
    path: str, image_format: FormatChoice = "auto", options: OpenOptions | None = None
) -> list[ImageInfo]:
    """Return the descriptions of an image and of all its bases, the image itself first.

    For a raw file, and an image whose header is invalid, the list has only the description of the
    file itself.

    Args:
        path: The image.
        image_format: Format of the image; ``auto`` detects the format from the first bytes.
        options: How to open the image, and which bases are allowed; None for the defaults.

    Raises:
        NotQedError: ``image_format`` is ``qed`` and the file has no QED magic.  Or it is ``auto``,
            and ``path`` is a URL of an image in another format than QED and raw.
        ForeignError: The file is of a format that QEMU reads, and QEMU fails or is missing.
        BackingError: A base is missing or refused, or has a format that the policy forbids, or the
            chain is a loop or too long.
        QedError: The image or a base cannot be opened, locked or read.
    """
    options = options or OpenOptions()
    driver = foreign_driver_of(path) if image_format == "auto" else None
    allowed = options.remote.allowed
    if driver is not None:
        with open_image_file(path, options.read_lock) as image:
            async with foreign_disk(image, driver, options) as disk:
                return await _describe_layer(disk, "raw", allowed)
    top = await describe_any(path, image_format, options)
    if top.qed is None or not top.qed.readable:
        # A raw file has no base, and the base that an invalid header names must not be opened.
        return [top]
    async with open_image(path, options.read_lock, options.remote) as file:
        header = await read_header(file)
        with closing_layers(await open_bases(path, file, header, options, make_store(0))) as bases:
            found = [top]
            for base in bases:
                base_format: FormatChoice = "raw" if isinstance(base, RawLayer) else "qed"
                found += await _describe_layer(base.file, base_format, allowed)
            return found


async def _describe_layer(
    file: HostFile, image_format: FormatChoice, allowed: Sequence[Address]
) -> list[ImageInfo]:
    """Return the descriptions of an open file of a chain, and of all bases that QEMU reads for it.

    Args:
        file: The file.
        image_format: Format of the file, unless QEMU serves it.
        allowed: As for `describe`.

    Raises:
        ForeignError: QEMU serves the file, and `virtual_size` fails for a base.
        HostError: A file cannot be read.
    """
    graph = graph_of(file)
    if graph is None:
        return [await _describe_file(file, file.path, image_format, allowed)]
    found = [_describe_image(graph.images[0], file.size())]
    for image in graph.images[1:]:
        if image.driver in ("raw", "qed"):
            own: FormatChoice = "raw" if image.driver == "raw" else "qed"
            found.append(await _describe_file(image.file, image.file.path, own, allowed))
        else:
            size = await run_in_thread(virtual_size, graph, image)
            found.append(_describe_image(image, size))
    return found


def _describe_image(image: ChainImage, size: int) -> ImageInfo:
    """Return the description of an image that QEMU reads, whose disk has ``size`` bytes."""
    found = image.file.stat()
    links, path = image.links, image.file.path
    stated = links.backing_driver
    foreign = None
    if links.backing:
        backing = resolve_name(links.backing, path, raw_format=stated == "raw")
        foreign = ForeignInfo(backing, stated)
    return ImageInfo(
        path, image.driver, size, found.st_size, allocated_bytes(found), foreign=foreign
    )


async def _describe_file(
    file: HostFile, path: str, image_format: FormatChoice, allowed: Sequence[Address]
) -> ImageInfo:
    """Return the description of an open file; ``allowed`` is as for `describe`."""
    try:
        if file.fileno() >= 0:
            return describe_open(DescriptorReader(file.fileno()), path, image_format, allowed)
        call = partial(describe_open, FileReader(file), path, image_format, allowed)
        return await run_in_thread(call)
    except OSError as error:
        raise HostError.from_os(error, file.name, "read") from error
