"""Rebasing an overlay: it gets another backing file, and its content stays the same.

Where the image stores nothing itself, its base shows through.  So wherever the two bases
differ, the content of the old one is first copied into the image, which still names the old
base.  The disk then reads the same over either base.  When the copy is durable, the name
changes in one step.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.disk.creation.newheader import backing_name
from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import BackingError, UsageError
from qedfuse.hostio.imagefile import open_image_file
from qedfuse.ondisk.constants import Feature
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import refuse_backing_loop
from qedfuse.tools.common.writabledisk import open_writable
from qedfuse.tools.editing.rebasecopy import RebaseCopy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk
    from qedfuse.tools.common.formatprobe import ImageFormat
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class RebaseResult:
    """The result of a rebase.

    Attributes:
        backing: The name of the backing file, as stored now; None for none.
        backing_format: Format of the backing file; None for none.
        copied_bytes: Bytes of the disk that were copied into the image as data.
        zero_bytes: Bytes of the disk that became zero clusters of the image.
    """

    backing: str | None
    backing_format: str | None
    copied_bytes: int = 0
    zero_bytes: int = 0


async def rebase(
    path: str,
    backing: str | None,
    *,
    backing_format: ImageFormat | None = None,
    unsafe: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> RebaseResult:
    """Give an image another backing file, or none.

    Args:
        path: The image.
        backing: The new backing file, by a name that is absolute or begins at the image's
            directory; None or empty for none.
        backing_format: Its format; may be omitted if it is QED, except with ``unsafe``.
        unsafe: Change the name and nothing else; no backing file is opened.
        options: How to open the image; ``writable`` is set in any case.  The new backing
            file is trusted, since the user names it.
        progress: Called with the bytes of the disk that are compared, and its size.

    Raises:
        UsageError: The name cannot be stored, or the format must be given.
        BackingError: A backing file is missing, not of the given format, or the image.
        QedError: The image cannot be opened for writing, or the host refused.  The content
            of its disk is the same, whichever backing file it names.
    """
    backing = backing or None
    name = backing_name(backing)
    options = options or OpenOptions()
    if unsafe:
        if backing is not None and backing_format is None:
            raise UsageError(_no_format(path, backing))
        if backing is not None:
            refuse_backing_loop(path, backing, options.backing.working_directory)
        async with open_writable(path, options, with_bases=False) as disk:
            await disk.set_backing(name, raw=backing_format == "raw")
        return RebaseResult(backing, backing_format if backing else None)
    async with (
        open_writable(path, options) as disk,
        _new_chain(disk, backing, backing_format, options) as chain,
    ):
        copy = RebaseCopy(disk, chain)
        await copy.run(progress)
        raw = chain.has_base and isinstance(chain.layers[1], RawLayer)
        await disk.set_backing(name, raw=raw)
        if progress is not None:
            progress(disk.size, disk.size)
    found = "raw" if raw else "qed"
    return RebaseResult(backing, found if backing else None, copy.copied_bytes, copy.zero_bytes)


@asynccontextmanager
async def _new_chain(
    disk: Disk,
    backing: str | None,
    backing_format: ImageFormat | None,
    options: OpenOptions,
) -> AsyncIterator[Chain]:
    """Yield the chain of the image over its new base; its first layer is the disk's own.

    Raises:
        BackingError: The new base cannot be used, or its chain leads back to the image.
        UsageError: The base is raw, and no format is given.
    """
    top = disk.chain.layers[0]
    if backing is None:
        yield Chain([top])
        return
    features = int(Feature.BACKING_FILE)
    if backing_format == "raw":
        features |= int(Feature.BACKING_FORMAT_NO_PROBE)
    header = replace(disk.header, features=features, backing_filename_size=len(backing))
    base = backing_path(disk.path, backing, options.backing.working_directory)
    # The format in the options applies to the bases that the image has.  The new one is raw if
    # the header above says so; otherwise its first bytes decide.
    policy = replace(options.backing, trusted=base, format=None)
    with open_image_file(disk.path, None) as image:
        # A loop is detected before the file is locked.  Otherwise its lock would conflict with
        # that of the open disk, and the message would be "in use".
        bases = await open_bases(
            disk.path,
            image,
            header,
            replace(options, backing=policy, writable=False),
            make_store(options.cache_bytes),
            name=backing,
        )
    with closing_layers(bases):
        if isinstance(bases[0], RawLayer) and backing_format != "raw":
            if backing_format is None:
                raise UsageError(_no_format(disk.path, backing))
            msg = (
                f"{disk.name}: backing file {bases[0].file.name}: found no QED magic, expected "
                "a QED image"
            )
            raise BackingError(msg)
        yield Chain([top, *bases])


def _no_format(path: str, backing: str) -> str:
    """Return the message that the format of a base must be given."""
    return (
        f"{printable(path)}: backing file {printable(backing)}: found no format, expected -F raw "
        "or -F qed"
    )
