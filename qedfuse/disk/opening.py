"""Opening an image and its chain: lock, read the header, call the inspector if needed, close."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from qedfuse.disk.creation.emptyimage import EmptyImage
from qedfuse.disk.disk import Disk
from qedfuse.disk.lookup.backing import open_bases
from qedfuse.disk.lookup.foreignopening import foreign_disk
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import NeedsCheckError, UsageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign_driver, is_qed
from qedfuse.remote.address import is_nbd_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

    Inspector: TypeAlias = Callable[[HostFile, Header], Awaitable[None]]
    """Checks an image whose tables must not be trusted; raises an error to refuse the image."""


@asynccontextmanager
async def open_disk(
    path: str,
    options: OpenOptions | None = None,
    *,
    inspector: Inspector | None = None,
    with_bases: bool = True,
) -> AsyncIterator[Disk]:
    """Open an image and its chain; close both cleanly at the end of the ``async with`` block.

    Args:
        path: The path or URL of the image.  Only a QED image in a local file can be opened for
            writing.
        options: How to open the image; None for the defaults, which open it read-only.
        inspector: Called if the image is opened for writing and its tables must not be trusted.
            If None, such an image is refused.
        with_bases: Whether to open the bases.  Without its base an image can still be inspected,
            compacted, emptied and given another base.

    Raises:
        QedError: The options contradict each other, a file cannot be opened or locked or is
            refused, or at the close something could not be made durable.
    """
    options = options or OpenOptions()
    if options.writable and options.force_share:
        msg = f"{printable(path)}: force_share: expected the image opened read-only"
        raise UsageError(msg)
    async with (
        open_image(path, options.image_lock, options.remote, writable=options.writable) as file,
        open_disk_in(file, path, options, inspector=inspector, with_bases=with_bases) as disk,
    ):
        yield disk


@asynccontextmanager
async def open_disk_in(
    file: HostFile,
    path: str,
    options: OpenOptions,
    *,
    inspector: Inspector | None = None,
    with_bases: bool = True,
) -> AsyncIterator[Disk]:
    """Open the image in an open file, and its chain, as `open_disk` does.

    Args:
        file: The open file, locked and writable as ``options`` say.  It is closed at the end of the
            block.  If an error is raised before the block begins, the caller must close it.
        path: The path or URL of the file.
        options: How to open the image.
        inspector: See `open_disk`.
        with_bases: See `open_disk`.

    Raises:
        QedError: See `open_disk`.
    """
    store = make_store(options.cache_bytes)
    signature = await file.pread(0, SIGNATURE_BYTES)
    driver = foreign_driver(signature)
    if driver is not None:
        async with _open_foreign_disk(file, driver, options, store, path) as disk:
            yield disk
        return
    if is_nbd_url(path) and not is_qed(signature):
        async with _open_raw_disk(file, options, store, path) as disk:
            yield disk
        return
    header = await read_header(file)
    if options.writable:
        await _inspect(file, header, inspector)
    bases = await open_bases(path, file, header, options, store) if with_bases else []
    disk = Disk(file, header, bases, options, store, path)
    # From here on the disk owns the files, and closes them.
    async with disk.serving():
        if disk.scan_is_short:
            # Until the scan has ended, the free clusters of the file are not known, so writes make
            # the file longer.  A mount that ends in a crash soon after each start would therefore
            # grow the file each time.  A short scan takes only milliseconds.
            await disk.ensure_scanned()
        yield disk


@asynccontextmanager
async def _open_foreign_disk(
    file: HostFile, driver: str, options: OpenOptions, store: SliceStore, path: str
) -> AsyncIterator[Disk]:
    """Open an image in another format of QEMU, as the base of an empty image in memory."""
    if options.writable:
        msg = (
            f"{file.name}: found a {driver} image, which can only be read, expected QED (a mount "
            "accepts the image with -r, -o snapshot or -o overlay=FILE)"
        )
        raise UsageError(msg)
    async with (
        foreign_disk(file, driver, options) as below,
        _open_raw_disk(below, options, store, path) as disk,
    ):
        yield disk


@asynccontextmanager
async def _open_raw_disk(
    file: HostFile, options: OpenOptions, store: SliceStore, path: str
) -> AsyncIterator[Disk]:
    """Open a disk that shows the bytes of a file: an empty image in memory, over the file."""
    top = EmptyImage(file)
    disk = Disk(top, top.header, [RawLayer(file)], options, store, path)
    async with disk.serving():
        yield disk


async def _inspect(file: HostFile, header: Header, inspector: Inspector | None) -> None:
    """Call the inspector if the tables of an image must not be trusted for writing.

    They must not be trusted if NEED_CHECK is set, or if the file ends with a partial cluster.
    `FileLength.grow` would cut off this cluster, and a table entry may refer to it.
    """
    tail_bytes = header.geometry.in_cluster(file.size())
    if not header.need_check and not tail_bytes:
        return
    if inspector is None:
        found = (
            "NEED_CHECK set"
            if header.need_check
            else f"{tail_bytes} bytes past the last whole cluster"
        )
        msg = f"{file.name}: found {found}: the image must be checked before it is written to"
        raise NeedsCheckError(msg)
    await inspector(file, header)
