"""Writing what an overlay holds into its base.

The order makes an interruption harmless, at any moment:

1. The base grows, if the overlay is larger.  What is added reads as zeros, which is what
   the overlay shows past the end of a shorter base.
2. The overlay's data goes into the base.  Only ranges change that the overlay has itself,
   and so hides: over the base it reads as before, with none, some or all of this done.
3. The base is made durable.  From here on both hold the same where the overlay has
   anything.
4. Only then the overlay's entries become unallocated.  Each one that does uncovers a
   cluster of the base that reads the same, so it does not matter how many have done so,
   nor in what order.  The tables and the space go last.

The base reads differently as soon as the first byte has been written to it.  That is
what this is for, but other overlays over it are spoilt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.lookup.backing import open_bases, read_header
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import BackingError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.editing.commitbase import COPY_CHUNK_BYTES, BaseFile, check_same, open_base
from qedfuse.tools.editing.commitsource import OverlayAlone, open_upper_images

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.editing.commitbase import Base
    from qedfuse.tools.editing.commitsource import CommitSource

    Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What committing came to; all in bytes.

    Attributes:
        base: The base, fit to be printed.
        copied_bytes: How much data went into the base.
        zero_bytes: How much of the base became zeros.
        size_before: Size of the base's disk before.
        size: Size of the base's disk now.
        bytes_before: Length of the overlay's file before.
        bytes_after: Length of the overlay's file now.
        free_clusters: How many clusters of a QED base are free now, as far as known,
            because moving others there takes longer than the options allow; they take up
            no space on the host.
        between: How many images lie between the overlay and the base; they show a mixture
            of what they showed and what the overlay shows.
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
        base: A lower file of the chain, to which all that lies over it is committed.  The
            overlay is kept then: what it holds it hides from the images between, which
            show a mixture from now on.
        keep: Leave the overlay as it is.
        options: How to open it and the bases; both files are locked for writing.
        progress: Called with how much is done of how much, in any unit.

    Raises:
        BackingError: The image has no base, or one that cannot be used, or no such base.
        QedError: A file cannot be opened for writing, or the host refused.  The overlay
            reads over its base as it did before.
    """
    options = replace(options or OpenOptions(), force_share=False)
    if base is not None:
        async with open_upper_images(path, base, replace(options, writable=False)) as found:
            source, place = found
            result = await _commit(source, place, options, progress)
            return replace(result, bytes_before=source.file_bytes, bytes_after=source.file_bytes)
    # The base is about to change, so the overlay does without it.
    overlay_options = replace(options, writable=not keep)
    async with open_disk(
        path, overlay_options, inspector=inspect_image, with_bases=False
    ) as overlay:
        before = overlay.fstat().st_size

        async def empty() -> None:
            await overlay.empty(_half(progress, second=True))

        result = await _commit(
            OverlayAlone(overlay),
            await _find_base(overlay, options),
            options,
            progress if keep else _half(progress),
            None if keep else empty,
        )
        if progress is not None:
            progress(overlay.size, overlay.size)
        after = before if keep else overlay.statistics().file_bytes
        return replace(result, bytes_before=before, bytes_after=after)


async def _commit(
    source: CommitSource,
    place: BaseFile,
    options: OpenOptions,
    progress: Progress | None,
    empty: Callable[[], Awaitable[None]] | None = None,
) -> CommitResult:
    """Bring a base up to date; call ``empty`` once that is durable.

    Returns:
        What came of it, without the lengths of the overlay's file.
    """
    async with open_base(place, options) as base:
        old_size = base.size
        if source.size > base.size:
            await base.grow(source.size)
        copied, zeroes = await _copy(source, base, progress)
        await base.flush()
        await base.tidy()
        if empty is not None:
            await empty()
        return CommitResult(
            *(base.name, copied, zeroes, old_size, base.size, 0, 0),
            free_clusters=base.free_clusters,
            between=place.depth - 1,
        )


def _half(progress: Progress | None, *, second: bool = False) -> Progress | None:
    """Report what is half of the work; the other half is to empty the overlay."""
    if progress is None:
        return None
    return lambda done, whole: progress(done + (whole if second else 0), 2 * whole)


async def _copy(source: CommitSource, base: Base, progress: Progress | None) -> tuple[int, int]:
    """Bring the base up to date; give how many bytes of data and of zeros that took."""
    copied = zeroes = 0
    for start in source.batch_starts():
        if progress is not None:
            progress(start, source.size)
        for extent in await source.extents(start):
            if extent.kind is Kind.DATA:
                await _copy_data(source, base, extent, progress)
                copied += extent.length
            elif extent.kind is Kind.ZERO:
                await base.zero(extent.start, extent.length)
                zeroes += extent.length
    return copied, zeroes


async def _copy_data(
    source: CommitSource, base: Base, extent: Extent, progress: Progress | None
) -> None:
    """Copy one extent."""
    for at in range(extent.start, extent.end, COPY_CHUNK_BYTES):
        length = min(COPY_CHUNK_BYTES, extent.end - at)
        await base.write(at, await source.read(at, length))
        if progress is not None:
            progress(at + length, source.size)


async def _find_base(overlay: Disk, options: OpenOptions) -> BaseFile:
    """Find the base by reading the chain once.

    Nothing is locked: what is found is opened again for writing.
    """
    file = PosixFile.open(overlay.path)
    try:
        check_same(overlay.path, file.stat(), overlay.fstat())
        header = await read_header(file)
        if not header.has_backing:
            msg = f"{overlay.name}: backing file: found none, expected one to commit to"
            raise BackingError(msg)
        bases = await open_bases(
            overlay.path, file, header, replace(options, lock=False), make_store(1 << 20)
        )
    finally:
        file.close()
    try:
        base = cast("PosixFile", bases[0].file)
        return BaseFile(base.path, base.stat(), isinstance(bases[0], RawLayer), 1)
    finally:
        for layer in bases:
            layer.file.close()
