"""Opening an image in a format other than QED and raw, as a raw disk that QEMU serves."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.basepolicy import checked_name, open_local_base
from qedfuse.errors import BackingError, BackingRefusedError, UsageError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.remote.address import is_url, shown_name
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.options import BackingPolicy, OpenOptions
    from qedfuse.foreign.foreignfile import ForeignFile
    from qedfuse.foreign.graph import Graph
    from qedfuse.hostio.hostfile import FileIdentity, HostFile, ReadableFile


async def open_foreign(file: HostFile, driver: str, options: OpenOptions) -> ForeignFile:
    """Open an image in a format of QEMU; return the disk that QEMU serves.

    The caller must close the disk.

    Args:
        file: The open file of the image; it is closed with the disk, and after an error.
        driver: The format of the image as QEMU calls it.
        options: Which files the image may name, and how they are locked.

    Raises:
        UsageError: The image is not a local file.
        BackingError: A file that the image names is missing or refused.
        ForeignError: QEMU is not installed or fails, or the image is encrypted, damaged or
            otherwise unusable.
        ImageInUseError: Another program has locked a file.
        HostError: A file cannot be read, or a system call failed.
    """
    # Imported late, because only few images need these modules.
    from qedfuse.foreign.graph import Limits  # noqa: PLC0415  late, see above
    from qedfuse.foreign.opening import ForeignOpening  # noqa: PLC0415

    if not isinstance(file, PosixFile):
        file.close()
        msg = f"{file.name}: found a {driver} image, expected a local file in this format"
        raise UsageError(msg)
    limits = Limits(
        partial(_open_named, policy=options.backing),
        any_file=options.backing.mode == "any",
        lock=options.lock,
        share=options.force_share,
    )
    opening = ForeignOpening(file, driver, limits)
    try:
        return await run_in_thread(opening.finish, abandon_on_cancel=True)
    except BaseException:
        opening.abandon()
        raise


@asynccontextmanager
async def foreign_disk(
    file: HostFile, driver: str, options: OpenOptions
) -> AsyncIterator[ForeignFile]:
    """Yield the disk of an image that the user has named; close the disk at the end of the block.

    See `open_foreign`.
    """
    disk = await open_foreign(file, driver, options)
    try:
        yield disk
    finally:
        disk.close()


def is_foreign(layer: Layer) -> bool:
    """Return whether QEMU serves a layer of a chain."""
    return driver_of(layer.file) is not None


def driver_of(file: ReadableFile) -> str | None:
    """Return the format, as QEMU calls it, of an image that QEMU serves; None for other files."""
    driver: str | None = getattr(file, "driver", None)
    return driver


def content_identity(file: ReadableFile) -> FileIdentity:
    """Return a value that is equal for two open files only if they have the same bytes.

    A disk that QEMU serves has the identity of its image, but not the bytes of that file.  Its
    bytes also depend on the files that the image names, and these on the path by which the image
    was opened.  So its value differs from that of every other open file.
    """
    return file.identity if driver_of(file) is None else ("disk", id(file))


def graph_of(file: ReadableFile) -> Graph | None:
    """Return the files from which QEMU serves a disk, bases included; None for other disks."""
    graph: Graph | None = getattr(file, "graph", None)
    return graph


def files_of(file: ReadableFile) -> Sequence[ReadableFile]:
    """Return the open files that have the bytes of a file of a chain, the file itself first.

    If QEMU serves the file, these are the image and all files that it and its bases name.
    """
    graph = graph_of(file)
    return [file] if graph is None else [*graph.files, *graph.extents]


def refuse_loop(disk: ReadableFile, image: str, above: Container[FileIdentity]) -> None:
    """Refuse a base that is read from an image above it.

    The chain below a disk that QEMU serves is known only when QEMU has opened the disk.

    Args:
        disk: The open base; only a disk that QEMU serves can be refused.
        image: Name in messages of the image whose base it is.
        above: The identities of the images above the base.

    Raises:
        BackingError: The base is read from one of these images.
    """
    for file in files_of(disk)[1:]:
        if file.identity in above:
            msg = f"{image}: backing file {disk.name}: found a loop in the chain through "
            raise BackingError(msg + file.name)


def start_maps(layers: Iterable[Layer]) -> None:
    """Start a program of QEMU for each layer that QEMU serves, to find where the layer has data.

    The call blocks for some milliseconds for each such layer.
    """
    for layer in layers:
        start: Callable[[], None] | None = getattr(layer.file, "start_map", None)
        if start is not None:
            start()


def refuse_foreign(layer: Layer) -> None:
    """Raise `UsageError` if QEMU serves a layer, because such an image can only be read."""
    driver = driver_of(layer.file)
    if driver is not None:
        found = f"found a {driver} image, which can only be read"
        msg = f"{layer.file.name}: {found}, expected QED or raw"
        raise UsageError(msg)


def _open_named(name: bytes, image: PosixFile, *, policy: BackingPolicy) -> PosixFile:
    """Open a file that an image in a format of QEMU names, if the policy allows it."""
    found = checked_name(name, image.name)
    if policy.mode == "none":
        msg = f"{image.name}: backing file {shown_name(found)}: refused by backing=none"
        raise BackingRefusedError(msg)
    if is_url(found):
        msg = (
            f"{image.name}: backing file {shown_name(found)}: refused: found a URL, expected a "
            "local file"
        )
        raise BackingRefusedError(msg)
    path = backing_path(image.path, found, policy.working_directory)
    return open_local_base(path, image, policy, None)
