"""Committing an overlay: its data is written into its base.

The order makes an interruption harmless at any moment:

1. The base grows if the overlay is larger.  The added range reads as zeros, which is what
   the overlay shows past the end of a shorter base.
2. The overlay's data is written into the base.  Only ranges change that the overlay stores
   itself and therefore hides: read through the overlay, the disk is the same whether none,
   some or all of this is done.
3. The base is made durable.  From now on both store the same content wherever the overlay
   stores anything.
4. Only then the overlay's entries become unallocated.  Each of them uncovers a cluster of the
   base that reads the same, so neither their number nor their order matters.  The tables and
   their space go last.

The base reads differently as soon as the first byte has been written to it.  That is the
purpose, but it corrupts other overlays over the same base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.tools.editing.commitbase import COPY_CHUNK_BYTES, find_base, open_base
from qedfuse.tools.editing.commitsource import OverlayAlone, open_upper_images

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.editing.commitbase import Base, BaseFile
    from qedfuse.tools.editing.commitsource import CommitSource
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The result of a commit; in bytes, except the clusters and images.

    Attributes:
        base: The base, as printable text.
        copied_bytes: Data that was written into the base.
        zero_bytes: Ranges of the base that became zeros.
        size_before: Size of the base's disk before.
        size: Size of the base's disk afterwards.
        bytes_before: Length of the overlay's file before.
        bytes_after: Length of the overlay's file afterwards.
        free_clusters: Clusters within the file of a QED base that are known to be free,
            because moving others there takes longer than the options allow.  They are
            holes.
        between: Number of images between the overlay and the base.  They now show a mixture
            of their old content and the overlay's.
    """

    base: str
    copied_bytes: int
    zero_bytes: int
    size_before: int
    size: int
    bytes_before: int
    bytes_after: int
    free_clusters: int
    between: int = 0


async def commit(
    path: str,
    *,
    base: str | None = None,
    keep: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> CommitResult:
    """Write an overlay's own data into its base, and empty the overlay.

    Args:
        path: The overlay.
        base: A lower file of the chain, into which the data of all images over it is
            written.  The overlay is then kept: without its data the images between, which
            now show a mixture, would show through.
        keep: Do not empty the overlay.
        options: How to open it and the bases; both files are locked for writing.
        progress: Called with the work done and the whole work, in any unit.

    Raises:
        BackingError: The image has no base, or none of this name, or it cannot be used.
        QedError: A file cannot be opened for writing, or the host refused.  The overlay
            reads the same as before.
    """
    options = replace(options or OpenOptions(), force_share=False)
    if base is not None:
        async with open_upper_images(path, base, replace(options, writable=False)) as found:
            source, base_file = found
            result = await _commit(source, base_file, options, progress)
            return replace(result, bytes_before=source.file_bytes, bytes_after=source.file_bytes)
    # The base is going to change, so the overlay is opened without it.
    overlay_options = replace(options, writable=not keep)
    async with open_disk(
        path, overlay_options, inspector=inspect_image, with_bases=False
    ) as overlay:
        before = overlay.fstat().st_size

        async def empty() -> None:
            await overlay.empty(_half_of(progress, second=True))

        result = await _commit(
            OverlayAlone(overlay),
            await find_base(overlay, options),
            options,
            progress if keep else _half_of(progress),
            None if keep else empty,
        )
        if progress is not None:
            progress(overlay.size, overlay.size)
        after = before if keep else overlay.statistics().file_bytes
        return replace(result, bytes_before=before, bytes_after=after)


async def _commit(
    source: CommitSource,
    base_file: BaseFile,
    options: OpenOptions,
    progress: Progress | None,
    empty: Callable[[], Awaitable[None]] | None = None,
) -> CommitResult:
    """Write a source's data into a base; call ``empty`` when that is durable.

    Returns:
        The result, with 0 for the lengths of the overlay's file.
    """
    async with open_base(base_file, options) as base:
        old_size = base.size
        if source.size > base.size:
            await base.grow(source.size)
        copied, zero = await _copy(source, base, progress)
        await base.flush()
        await base.tidy()
        if empty is not None:
            await empty()
        return CommitResult(
            *(base.name, copied, zero, old_size, base.size, 0, 0),
            free_clusters=base.free_clusters,
            between=base_file.depth - 1,
        )


def _half_of(progress: Progress | None, *, second: bool = False) -> Progress | None:
    """Return a callback that reports the first or the second half of the whole work.

    The first half is the copy, the second half is emptying the overlay.
    """
    if progress is None:
        return None
    return lambda done, whole: progress(done + (whole if second else 0), 2 * whole)


async def _copy(source: CommitSource, base: Base, progress: Progress | None) -> tuple[int, int]:
    """Write all data and zeros into the base; return the bytes of data, and those of zeros."""
    copied = zero = 0
    for start in source.batch_starts():
        if progress is not None:
            progress(start, source.size)
        for extent in await source.extents(start):
            if extent.kind is Kind.DATA:
                await _copy_data(source, base, extent, progress)
                copied += extent.length
            elif extent.kind is Kind.ZERO:
                await base.zero(extent.start, extent.length)
                zero += extent.length
    return copied, zero


async def _copy_data(
    source: CommitSource, base: Base, extent: Extent, progress: Progress | None
) -> None:
    """Write one extent of data into the base, chunk by chunk."""
    for at in range(extent.start, extent.end, COPY_CHUNK_BYTES):
        length = min(COPY_CHUNK_BYTES, extent.end - at)
        await base.write(at, await source.read(at, length))
        if progress is not None:
            progress(at + length, source.size)
