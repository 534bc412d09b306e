"""Describing an image and all its bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
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
    """Return the descriptions of an image and of all its bases, the image itself first.

    For a raw file, and for an image whose header is invalid, the list has only the description
    of the file itself.

    Args:
        path: The image.
        image_format: Format of the image; ``auto`` detects the format from the first bytes.
        options: How to open the image, and which bases are allowed; None for the defaults.

    Raises:
        NotQedError: ``image_format`` is ``auto`` and the file is of a foreign format, or
            ``image_format`` is ``qed`` and the file has no QED magic.
        BackingError: A base is missing, refused or of another format, or the chain is a loop
            or too long.
        QedError: The image or a base cannot be opened, locked or read.
    """
    options = options or OpenOptions()
    top = describe(path, image_format, lock=options.read_lock)
    if top.qed is None or not top.qed.readable:
        # The chain is not followed, because a raw file has no base, and the base that an
        # invalid header names must not be opened.
        return [top]
    with open_image_file(path, options.read_lock) as file:
        header = await read_header(file)
        with closing_layers(await open_bases(path, file, header, options, make_store(0))) as bases:
            return [top, *(_describe_base(base) for base in bases)]


def _describe_base(base: Layer) -> ImageInfo:
    """Return the description of a base that is open.

    Raises:
        HostError: The base cannot be read.
    """
    file = cast("PosixFile", base.file)
    try:
        return describe_open(file.fd, file.path, "raw" if isinstance(base, RawLayer) else "qed")
    except OSError as error:
        raise HostError.from_os(error, file.name, "read") from error
