"""Copying a disk, which may be an image with a backing chain, into a file, image or pipe."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.foreignopening import files_of
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import UsageError
from qedfuse.hostio.regular import identity_of
from qedfuse.remote.address import require_local
from qedfuse.text import printable
from qedfuse.tools.common.pipe import is_stream, open_stream
from qedfuse.tools.copying.conversion import Conversion, RawStream
from qedfuse.tools.copying.diskcopy import DEFAULT_STREAMS
from qedfuse.tools.copying.imagespec import ImageSpec
from qedfuse.tools.source.source import open_source

if TYPE_CHECKING:
    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.tools.copying.conversion import ConvertResult
    from qedfuse.tools.source.source import Source
    from qedfuse.util.backgroundtasks import Progress


async def convert(
    source_path: str,
    target_path: str,
    spec: ImageSpec | None = None,
    *,
    source_format: FormatChoice = "auto",
    into_existing: bool = False,
    overwrite: bool = False,
    compare: bool = False,
    durable: bool = True,
    streams: int = DEFAULT_STREAMS,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Copy a disk into a new file, an existing file, image or device, or a pipe.

    A new file gets its name when the copy is complete.  On a file system without hard links an
    empty file may have the name for a moment (`NewFile`).

    Args:
        source_path: An image, a raw file or device, a URL, or a pipe (``-``: standard input).
        target_path: The file or device to write, or a pipe for raw content (``-``: standard
            output).
        spec: Format, geometry and backing file of the target; None for a default QED image.
        source_format: Format of the source; ``auto`` detects the format from the first bytes.
        into_existing: Write into an existing file, image or device.  Refused if the source is a
            pipe; ignored if only the target is a pipe.
        overwrite: Replace an existing file; ignored with ``into_existing`` and for a pipe.
        compare: After the copy, compare the source and the target.  A new file gets its name only
            if they are equal.
        durable: Make a new file durable before it gets its name, and an existing file or device
            before the return.  An existing image is always made durable.
        streams: Maximum number of chunks that are copied concurrently, 1 to 16.  Ignored for pipes
            and with ``into_existing``.
        options: How to open the source, the backing file and an existing target.  With ``lock``
            False only a file that is replaced is locked.  ``force_share`` does not apply to the
            target.
        progress: Called with the guest offset that the copy has reached, and the size of the disk.
            For a source that is a pipe, both are the number of bytes copied so far.

    Raises:
        UsageError: The arguments contradict each other, or do not fit the source or the target.  Or
            the target is a URL, is the source or a file from which the source is read, or cannot
            hold a disk of this size.  Or it exists, and neither ``overwrite`` nor
            ``into_existing`` is set.
        ImageInUseError: The source, the target or the file to replace is in use by another
            program.  Or another file has taken the name of the target during the copy.
        BackingError: The backing file cannot be used.
        BrokenPipeError: The target is a pipe whose reading end is closed.
        QedError: The source cannot be read, the target cannot be written, or the comparison
            found a difference.
    """
    require_local(target_path)
    spec, options = spec or ImageSpec(), options or OpenOptions()
    async with AsyncExitStack() as stack:
        source: Source | RawStream
        if is_stream(source_path):
            if source_format == "qed" or spec.backing is not None or compare or into_existing:
                msg = (
                    f"{printable(source_path)}: found a pipe as the source, expected a file (-f "
                    "qed, -n, --compare and a backing file need one)"
                )
                raise UsageError(msg)
            stream = await open_stream(source_path, os.O_RDONLY)
            stack.callback(stream.close)
            source = RawStream(stream, any_content=source_format == "raw")
        else:
            # A new image without a base has zeros after the copy in any case.
            whole = spec.format == "qed" and (into_existing or spec.backing is not None)
            source = await stack.enter_async_context(
                open_source(source_path, source_format, options, whole_sectors=whole)
            )
            _refuse_same_file(source, target_path)
        conversion = Conversion(
            source,
            target_path,
            spec,
            compare=compare,
            durable=durable,
            streams=streams,
            options=options,
            progress=progress,
        )
        if is_stream(target_path):
            return await conversion.to_pipe()
        if into_existing:
            return await conversion.to_existing()
        return await conversion.to_new(overwrite=overwrite)


def _refuse_same_file(source: Source, target_path: str) -> None:
    """Refuse a target from which the source is read; ignore one that does not exist."""
    try:
        target = os.stat(target_path)  # noqa: PTH116  a name, not a Path
    except OSError:
        return
    for depth, layer in enumerate(source.layer_files()):
        for number, file in enumerate(files_of(layer)):
            if file.identity != identity_of(target):
                continue
            found = "a base of the source" if depth else "the source itself"
            if number:
                found = "a file from which the source is read"
            msg = f"{printable(target_path)}: target: found {found}, expected another file"
            raise UsageError(msg)
