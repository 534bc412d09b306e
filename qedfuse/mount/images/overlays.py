"""Opening the disk of a source: either the image itself, or an overlay that takes the writes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.lookup.backing import read_backing_name
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import BackingError, HostError, RemoteError, UsageError, cannot_open
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.regular import identity_of
from qedfuse.mount.images.naming import shown_source
from qedfuse.remote.address import is_nbd_url, is_url, parse_address, require_storable
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.options import MountOptions


def disk_options(options: MountOptions) -> OpenOptions:
    """Return the options for opening the disk of a mount with ``options``."""
    return OpenOptions(
        writable=not options.read_only,
        force_share=options.force_share,
        backing=replace(options.backing, base_changed=options.base_changed),
        remote=options.remote,
        cache_bytes=options.cache_bytes,
        commit_seconds=options.commit_seconds,
        discard=options.discard,
        detect_zeroes=options.detect_zeroes,
        free_list=options.free_list,
        compact=options.compact,
        compact_bytes=options.compact_bytes,
        compact_seconds=options.compact_seconds,
    )


def open_source(path: str, options: MountOptions) -> AbstractAsyncContextManager[Disk]:
    """Return a context manager that keeps the disk of the image at ``path`` open during its block.

    Returns:
        A context manager for the disk of a temporary overlay of the image (``snapshot``), of the
        overlay that the user named (``overlay``), or of the image itself.  Entering the block
        raises QedError if the disk cannot be opened or an overlay cannot be made.
    """
    if options.snapshot:
        return _open_snapshot(path, options)
    if options.overlay is not None:
        return _open_overlay(path, options.overlay, options)
    return _open_itself(path, options)


def _snapshot_directory() -> str:
    """Return the directory for snapshots: ``TMPDIR`` if that is a directory, otherwise /var/tmp.

    The default is not /tmp, because a snapshot may become large, and /tmp is often in memory.
    """
    chosen = os.environ.get("TMPDIR")
    return chosen if chosen and os.path.isdir(chosen) else "/var/tmp"  # noqa: PTH112, S108  mkdtemp


@asynccontextmanager
async def _open_itself(path: str, options: MountOptions) -> AsyncIterator[Disk]:
    """Open the image itself.

    Raises:
        QedError: The image cannot be opened.  If the host does not permit a writable open, the
            message suggests ``-o ro``, except if the server of a backing file has refused.
    """
    is_open = False
    try:
        async with open_disk(path, disk_options(options), inspector=inspect_image) as disk:
            is_open = True
            yield disk
    except HostError as error:
        is_forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if is_open or options.read_only or not is_forbidden or isinstance(error, RemoteError):
            raise
        msg = f"{error} (opened for reading and writing; with -o ro, permission to read is enough)"
        raise HostError(msg, error.errno) from error


@asynccontextmanager
async def _open_snapshot(path: str, options: MountOptions) -> AsyncIterator[Disk]:
    """Make and open a temporary overlay, and unlink its file immediately after the open.

    Raises:
        HostError: The overlay cannot be made.
        QedError: The image cannot be opened.
    """
    directory = _snapshot_directory()
    try:
        temporary = tempfile.mkdtemp(prefix="qedfuse-", dir=directory)
    except OSError as error:
        raise HostError.from_os(error, printable(directory), "cannot make the snapshot") from error
    overlay = os.path.join(temporary, "snapshot.qed")  # noqa: PTH118
    try:
        await _make_overlay(overlay, path, options)
        # The overlay is not compacted at its close, because the kernel frees the whole file of
        # the overlay after the close.
        snapshot_options = replace(_overlay_options(path, options), compact="off")
        async with open_disk(overlay, snapshot_options, inspector=inspect_image) as disk:
            # The file is unlinked now.  So the kernel frees the space of the file when this process
            # ends, even if it crashes.
            shutil.rmtree(temporary, ignore_errors=True)
            yield disk
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@asynccontextmanager
async def _open_overlay(path: str, overlay: str, options: MountOptions) -> AsyncIterator[Disk]:
    """Open the overlay that the user named; make the overlay if it is missing.

    Raises:
        UsageError: The overlay exists, and the image at ``path`` is not its backing file; or the
            image's URL has a query that may hold a secret, which would be stored in the overlay.
        QedError: The overlay or the image cannot be opened, or the overlay cannot be made.
    """
    require_storable(path, " (-o snapshot makes an overlay that exists only during the mount)")
    if os.path.lexists(overlay):  # noqa: ASYNC240  no request is served yet, so this may block
        await _check_backing_file(overlay, path, options)
    else:
        await _make_overlay(overlay, path, options)
    async with open_disk(overlay, _overlay_options(path, options), inspector=inspect_image) as disk:
        yield disk


def _overlay_options(source: str, options: MountOptions) -> OpenOptions:
    """Return the options for opening an overlay of ``source``.

    The source is allowed as the backing file in any directory, because the user has named the
    source (`BackingPolicy.trusted`).
    """
    without_source = disk_options(options)
    return replace(without_source, backing=replace(without_source.backing, trusted=source))


async def _make_overlay(overlay: str, source: str, options: MountOptions) -> None:
    """Make an empty overlay of a source, with the geometry of the source.

    Raises:
        QedError: The source is not a usable image, or the overlay cannot be made.
    """
    # Imported late, because most mounts make no overlay.
    from qedfuse.disk.creation.create import create_image  # noqa: PLC0415
    from qedfuse.disk.creation.emptyimage import EmptyImage  # noqa: PLC0415
    from qedfuse.disk.lookup.baseversion import versions_of  # noqa: PLC0415

    source_options = replace(disk_options(options), writable=False)
    async with open_disk(source, source_options) as disk:
        files = [layer.file for layer in disk.chain.layers]
        # If the source is not a QED image, `open_disk` puts an empty image in memory over the
        # source.  The image in memory must not become a base.
        is_wrapped = isinstance(files[0], EmptyImage)
        await create_image(
            overlay,
            disk.size,
            cluster_size=disk.header.cluster_size,
            table_size=disk.header.table_size,
            backing=source,
            backing_is_raw=is_wrapped and is_nbd_url(source),
            mode=0o600,
            versions=versions_of(files[1:] if is_wrapped else files),
        )


async def _check_backing_file(overlay: str, source: str, options: MountOptions) -> None:
    """Check that the backing file of an existing overlay is ``source``, a path or a URL.

    Raises:
        UsageError: The overlay has no backing file, or the backing file is another file.
        BackingError: The backing file is missing or not accessible.
        QedError: The overlay or the source cannot be opened.
    """
    with open_image_file(overlay, None) as file:
        header = await read_header(file)
        if not header.has_backing:
            msg = f"overlay {file.name}: found no backing file, expected {shown_source(source)}"
            raise UsageError(msg)
        name = await read_backing_name(file, header)
    base = backing_path(overlay, name, options.backing.working_directory)
    if is_url(base) or is_url(source):
        if not (is_url(base) and is_url(source) and parse_address(base) == parse_address(source)):
            raise _other_backing_file(file.name, base, source)
        return
    try:
        expected = os.stat(source)  # noqa: PTH116
    except OSError as error:
        raise cannot_open(source, error) from error
    try:
        actual = os.stat(base)  # noqa: PTH116
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = f"overlay {file.name}: backing file {printable(base)}: {reason}"
        raise BackingError(msg) from error
    if identity_of(actual) != identity_of(expected):
        raise _other_backing_file(file.name, base, source)


def _other_backing_file(overlay: str, base: str, source: str) -> UsageError:
    """Return the error for an overlay whose backing file is ``base`` instead of ``source``."""
    return UsageError(
        f"overlay {overlay}: found backing file {shown_source(base)}, "
        f"expected {shown_source(source)}"
    )
