"""Committing an overlay: the overlay's data is written into its base.

The overlay reads the same after an interruption at any moment, because of the order of the steps:

1. The base grows if the overlay is larger.  The added range reads as zeros.  Where the overlay
   stores nothing, it already read as zeros past the end of the base.
2. The overlay's data is written into the base.  Only ranges change that the overlay stores itself,
   and the overlay does not read these ranges from the base.
3. The base is made durable.  From now on the base reads the same as the overlay wherever the
   overlay stores anything.
4. The overlay's entries become unallocated, unless the overlay is kept.  Each entry uncovers a
   cluster of the base that reads the same, so their order does not matter.  The overlay's tables
   and their space are released last.

If the caller names a base, it may lie further down the chain.  Steps 1 to 3 then treat the overlay
and the images above the base as one overlay, and step 4 is left out.

The base itself reads differently as soon as the first byte has been written to it.  This corrupts
all other overlays over the same base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.lookup.backing import read_backing_name
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.rememberedbase import accept_commit
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import BackingError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.regular import status_of
from qedfuse.ondisk.formats import PROBE_BYTES, probed_format
from qedfuse.remote.address import require_local
from qedfuse.text import printable
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
    """The result of a commit; sizes and lengths in bytes.

    Attributes:
        base: Name of the base's file, as printable text.
        copied_bytes: Bytes of the disk that were written into the base as data.
        zero_bytes: Bytes of the base's disk that were made zeros.
        size_before: Size of the base's disk before the commit.
        size_after: Size of the base's disk after the commit.
        bytes_before: Length of the overlay's file before the commit.
        bytes_after: Length of the overlay's file after the commit.
        free_clusters: Number of free clusters left in the file of a QED base; 0 if the number is
            unknown, and for a raw base.
        between: Number of images between the overlay and the base.  After the commit each of them
            reads as a mixture of its old content and the overlay's content.
    """

    base: str
    copied_bytes: int
    zero_bytes: int
    size_before: int
    size_after: int
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
    """Write an overlay's own data into its base; empty the overlay unless it is kept.

    Args:
        path: The overlay.
        base: A file of the chain below the overlay, into which the data of all images over it is
            written.  The overlay then keeps its data: if it became empty, old data of an image in
            between would be visible again.  None for the overlay's own base.
        keep: Do not empty the overlay.
        options: How to open the overlay and the bases; ``writable`` and ``force_share`` are
            ignored.  None for the defaults.
        progress: Called with the work done and the whole work, in the same unspecified unit.

    Raises:
        UsageError: The overlay or the base is a URL, or the base is an image that QEMU serves.
        BackingError: The overlay has no base, its chain has no file ``base``, or a base cannot be
            used.
        CorruptImageError: A table entry of one of the images is bad, or a check found damage.
        ImageInUseError: Another program uses an image, or has replaced the overlay or the base.
        QedError: A file cannot be opened, or a system call failed.

    After an error the overlay reads the same as before, but the base may have changed.
    """
    require_local(path)
    options = replace(options or OpenOptions(), force_share=False)
    if base is not None:
        require_local(base)
        async with open_upper_images(path, base, replace(options, writable=False)) as found:
            source, base_file = found
            result = await _commit(source, base_file, options, progress)
            if not result.between:
                await _accept_commit(path, base_file)
            return replace(result, bytes_before=source.file_bytes, bytes_after=source.file_bytes)
    # Opened without its base, which would otherwise stay locked for reading.  Then the commit could
    # not open the base for writing.
    overlay_options = replace(options, writable=not keep)
    async with open_disk(
        path, overlay_options, inspector=inspect_image, with_bases=False
    ) as overlay:
        before = overlay.fstat().st_size

        async def empty() -> None:
            await overlay.empty(_half_of(progress, second=True))

        base_file = await find_base(overlay, options)
        result = await _commit(
            OverlayAlone(overlay),
            base_file,
            options,
            progress if keep else _half_of(progress),
            None if keep else empty,
        )
        if progress is not None:
            progress(overlay.size, overlay.size)
        await _accept_commit(path, base_file)
        after = before if keep else overlay.statistics().file_bytes
        return replace(result, bytes_before=before, bytes_after=after)


async def _commit(
    source: CommitSource,
    base_file: BaseFile,
    options: OpenOptions,
    progress: Progress | None,
    empty: Callable[[], Awaitable[None]] | None = None,
) -> CommitResult:
    """Write a source's data into a base; call ``empty`` when the written data is durable.

    The lengths of the overlay's file are 0 in the result.
    """
    if base_file.declare_raw:
        await _refuse_magic(source, base_file)
    async with open_base(base_file, options) as base:
        old_size = base.size
        if source.size > base.size:
            await base.grow(source.size)
        copied, zero = await _copy(source, base, progress)
        await base.flush()
        await base.autocompact()
        if empty is not None:
            await empty()
        return CommitResult(
            *(base.name, copied, zero, old_size, base.size, 0, 0),
            free_clusters=base.free_clusters,
            between=base_file.depth - 1,
        )


async def _refuse_magic(source: CommitSource, base_file: BaseFile) -> None:
    """Refuse data that QEMU recognises as an image by the first bytes of the disk.

    The base is raw, and the overlay does not declare it raw.  So programs recognise its format by
    its first bytes, which the guest has written.  After the commit they would read the base as an
    image, with a backing file or extents that the guest chose.

    Raises:
        BackingError: The data is refused.
    """
    first = next(iter(await source.extents(0)), None)
    if first is None or first.start or first.kind is not Kind.DATA:
        return
    found = probed_format(bytes(await source.read(0, min(PROBE_BYTES, first.length))))
    if found is not None:
        msg = (
            f"{printable(base_file.path)}: not changed: the data to commit begins like a {found} "
            f"image, so the base would no longer be recognised as raw (to declare it raw: "
            f"{base_file.declare_raw})"
        )
        raise BackingError(msg)


async def _accept_commit(path: str, base_file: BaseFile) -> None:
    """Store, in the overlay's record of its base, the version of the base after the commit.

    With the old version, the next open of the overlay would warn that the base has changed.  The
    caller holds the lock of the overlay, if images are locked at all.
    """
    with open_image_file(path, None) as file:
        name = await read_backing_name(file, await read_header(file))
        accept_commit(file, name, status_of(base_file.path, printable(base_file.path)))


def _half_of(progress: Progress | None, *, second: bool = False) -> Progress | None:
    """Return a callback for the first half of the work, or for the ``second`` one."""
    if progress is None:
        return None
    return lambda done, whole: progress(done + (whole if second else 0), 2 * whole)


async def _copy(source: CommitSource, base: Base, progress: Progress | None) -> tuple[int, int]:
    """Write all data and zeros into the base; return the bytes of data and the bytes of zeros."""
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
