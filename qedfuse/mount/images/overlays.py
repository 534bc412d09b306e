"""Opening the disk of a source: the image itself, or an overlay that takes the writes."""

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

    The disk is that of a temporary overlay (``snapshot``), of a named overlay (``overlay``), or of
    the image itself.  Entering the block raises QedError if the disk cannot be opened.
    """
    if options.snapshot:
        return _open_snapshot(path, options)
    if options.overlay is not None:
        return _open_overlay(path, options.overlay, options)
    return _open_itself(path, options)


def _snapshot_directory() -> str:
    """Return the directory for snapshots; /var/tmp by default, because /tmp is often in memory."""
    chosen = os.environ.get("TMPDIR")
    return chosen if chosen and os.path.isdir(chosen) else "/var/tmp"  # noqa: PTH112, S108  mkdtemp


@asynccontextmanager
async def _open_itself(path: str, options: MountOptions) -> AsyncIterator[Disk]:
    """Open the image itself; if the host forbids writing, suggest ``-o ro`` in the error."""
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
    """Make and open a temporary overlay, and unlink its file immediately after the open."""
    directory = _snapshot_directory()
    try:
        temporary = tempfile.mkdtemp(prefix="qedfuse-", dir=directory)
    except OSError as error:
        raise HostError.from_os(error, printable(directory), "cannot make the snapshot") from error
    overlay = os.path.join(temporary, "snapshot.qed")  # noqa: PTH118
    try:
        await _make_overlay(overlay, path, options)
        # The overlay need not be compacted at its close, because its file is freed then.
        snapshot_options = replace(_overlay_options(path, options), compact="off")
        async with open_disk(overlay, snapshot_options, inspector=inspect_image) as disk:
            # The kernel frees the space of the unlinked file when this process ends, even if it
            # crashes.
            shutil.rmtree(temporary, ignore_errors=True)
            yield disk
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@asynccontextmanager
async def _open_overlay(path: str, overlay: str, options: MountOptions) -> AsyncIterator[Disk]:
    """Open the overlay that the user named; make it if it is missing.

    A URL with a query is refused, because the query may be a secret, which the overlay would store.
    """
    require_storable(path, " (-o snapshot makes an overlay that exists only during the mount)")
    if os.path.lexists(overlay):  # noqa: ASYNC240  no request is served yet, so this may block
        await _check_backing_file(overlay, path, options)
    else:
        await _make_overlay(overlay, path, options)
    async with open_disk(overlay, _overlay_options(path, options), inspector=inspect_image) as disk:
        yield disk


def _overlay_options(source: str, options: MountOptions) -> OpenOptions:
    """Return the options for opening an overlay; they allow ``source`` as the overlay's base."""
    without_source = disk_options(options)
    return replace(without_source, backing=replace(without_source.backing, trusted=source))


async def _make_overlay(overlay: str, source: str, options: MountOptions) -> None:
    """Make an empty overlay of a source, with the geometry of the source."""
    # Imported late, because most mounts make no overlay.
    from qedfuse.disk.creation.create import create_image  # noqa: PLC0415
    from qedfuse.disk.creation.emptyimage import EmptyImage  # noqa: PLC0415
    from qedfuse.disk.lookup.baseversion import versions_of  # noqa: PLC0415

    source_options = replace(disk_options(options), writable=False)
    async with open_disk(source, source_options) as disk:
        files = [layer.file for layer in disk.chain.layers]
        # If the source is not a QED image, `open_disk` puts an empty image in memory over it.  This
        # empty image must not become a base.
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
    """Raise an error if the backing file of an existing overlay is not ``source``."""
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
