"""Describing an image and all its bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.tools.inspection.info import describe, describe_open

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.hostio.posixfile import PosixFile
    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.tools.inspection.info import ImageInfo


async def describe_chain(
    path: str, image_format: FormatChoice = "auto", options: OpenOptions | None = None
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
        with closing_layers(await open_bases(path, file, header, options, make_store(0))) as layers:
            return [top, *(_describe_layer(layer) for layer in layers)]


def _describe_layer(layer: Layer) -> ImageInfo:
    """Describe a base that is open."""
    file = cast("PosixFile", layer.file)
    return describe_open(file.fd, file.path, "raw" if isinstance(layer, RawLayer) else "qed")
