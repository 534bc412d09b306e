"""A disk that is only read: a QED image with its chain, or a raw disk (see `RawSource`)."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.foreignopening import foreign_disk
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import NotQedError
from qedfuse.hostio.imagefile import open_image_file
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.regular import length_of, open_raw
from qedfuse.ondisk.constants import SECTOR
from qedfuse.ondisk.formats import SIGNATURE_BYTES
from qedfuse.remote.address import is_url
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import foreign_driver_of, format_of, probe_format

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from qedfuse.hostio.hostfile import FileIdentity, HostFile, ReadableFile
    from qedfuse.tools.common.formatprobe import FormatChoice, ImageFormat
    from qedfuse.tools.source.qedsource import QedSource

_log = logging.getLogger(__name__)

_EXTENTS_PER_CALL: Final = 1 << 14
"""`RawSource.extents` stops at this number of extents, or one extent later."""


class BlockingReader(Protocol):
    """An open file, with those parts of `ReadableFile` that worker threads use."""

    @property
    def identity(self) -> FileIdentity:
        """What distinguishes the file from all others; see `ReadableFile`."""

    @property
    def name(self) -> str:
        """The file's name in messages, as printable text."""

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.  Several
        threads may call this method concurrently.

        Raises:
            HostError: The file cannot be read.
        """


class Source(Protocol):
    """A disk to read from.

    Attributes:
        size: Bytes of the disk.
        format: ``raw`` or ``qed``.
        name: Name of the disk in messages, as printable text.
        path: Path of the file on the host, or its URL.
        is_device: Whether the disk is a block device.
    """

    size: int
    format: ImageFormat
    name: str
    path: str
    is_device: bool

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored, as extents in order and without gaps.

        The extents may cover only the beginning of the range.  The list is empty only if the range
        is empty, or begins at or past the end of the disk.

        An invalid table entry gives an extent of kind `Kind.BAD`.  The file offset and the depth of
        an extent are meaningful only for the kind `Kind.DATA`.

        Raises:
            HostError: The host cannot read a file.
        """

    def layer_files(self) -> Sequence[ReadableFile]:
        """Return the open files of all layers; a data extent refers to the file at its depth."""


class RawSource:
    """A raw file, a block device, a URL with raw content, or an image that QEMU serves."""

    format: ImageFormat = "raw"

    def __init__(self, file: ReadableFile, size: int, *, is_device: bool = False) -> None:
        """Prepare to read a disk from an open file, which the caller closes later.

        If ``size``, the bytes of the disk, is more than the file has, zeros follow the file.
        """
        self._file = file
        self.path = file.path
        self.name = file.name
        self.size = size
        self.is_device = is_device

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return the data and holes of a range, or of its beginning; see `Source.extents`."""
        await trio.lowlevel.checkpoint()
        end = min(start + length, self.size)
        result: list[Extent] = []
        at = start
        while at < end and len(result) < _EXTENTS_PER_CALL:
            data = _limited(await self._file.next_data(at), end)
            if data > at:
                result.append(Extent(Kind.ZERO, at, data - at))
            if data < end:
                at = _limited(await self._file.next_hole(data), end)
                result.append(Extent(Kind.DATA, data, at - data, data))
            else:
                at = end
        return result

    def layer_files(self) -> Sequence[ReadableFile]:
        """Return the only file."""
        return [self._file]


def _limited(found: int | None, end: int) -> int:
    """Return the offset ``found``, or ``end`` if ``found`` is None or lies past ``end``."""
    return end if found is None else min(found, end)


def _rounded_up(size: int, unit: int) -> int:
    """Return a size rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


@asynccontextmanager
async def open_source(
    path: str,
    format: FormatChoice = "auto",  # noqa: A002  the term of qemu-img
    options: OpenOptions | None = None,
    *,
    whole_sectors: bool = False,
    warn_if_foreign: bool = True,
) -> AsyncIterator[Source]:
    """Open and lock a disk for reading; close it at the end of the ``async with`` block.

    A block device or a URL is not locked.  An image that is detected in a file with the name of raw
    content is logged, because the guest of a raw disk can write the header of an image.

    Args:
        path: An image, a file or block device with raw content, or a URL.
        format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the file; ``writable`` is ignored.  None for the defaults.
        whole_sectors: Whether zeros extend a raw disk to whole sectors, as for QEMU and for a raw
            base.  Needed for a copy to a QED disk where the last sector may hold other bytes.
        warn_if_foreign: Whether to log an image of a foreign format in a file with such a name.

    Raises:
        UsageError: The URL is not valid.  Or the format is ``auto``, and the disk is encrypted by
            LUKS, or is a URL or a block device with an image of a foreign format.
        ForeignError: QEMU, which must read the file, fails or is missing.
        QedError: The file or a base cannot be opened or locked, is not of the stated format, or
            has an invalid header.  Or the backing policy refuses a base.
    """
    options = options or OpenOptions()
    unit = SECTOR if whole_sectors else 1
    if format == "auto" and (driver := foreign_driver_of(path)) is not None:
        with open_image_file(path, options.read_lock) as file:
            if warn_if_foreign:
                warn_if_named_raw(path, file.name, driver)
            async with foreign_disk(file, driver, options) as disk:
                yield RawSource(disk, _rounded_up(disk.size(), unit))
        return
    if is_url(path):
        async with open_image(path, None, options.remote) as remote_file:
            if format == "auto":
                signature = await remote_file.pread(0, SIGNATURE_BYTES)
                format = format_of(signature, remote_file.name)  # noqa: A001
                warn_if_named_raw(path, remote_file.name, format)
            if format == "raw":
                yield RawSource(remote_file, _rounded_up(remote_file.size(), unit))
                return
            async with _qed_source(remote_file, path, options) as source:
                yield source
        return
    if format == "auto":
        format = probe_format(path)  # noqa: A001
        warn_if_named_raw(path, printable(path), format)
    if format == "qed":
        if foreign_driver_of(path) is not None:  # the user has stated the format QED
            msg = f"{printable(path)}: not a QED image: found no QED magic at the file's beginning"
            raise NotQedError(msg)
        with open_image_file(path, options.read_lock) as image:
            async with _qed_source(image, path, options) as source:
                yield source
        return
    file = PosixFile(open_raw(path, os.O_RDONLY), path, writable=False)
    try:
        is_device = not stat.S_ISREG(file.stat().st_mode)
        if options.lock and not is_device:
            lock_image(file.fd, LockMode.to_read(share=options.force_share), file.name)
        # fstat(2) reports the length 0 for a block device, so `length_of` is used.
        size = _rounded_up(length_of(file.fd, file.name), unit)
        yield RawSource(file, size, is_device=is_device)
    finally:
        file.close()


def warn_if_named_raw(path: str, name: str, found: str) -> None:
    """Log that a file is read as an image, if it is one and its name ends with ``.raw``.

    The guest of a raw disk can write the header of an image to the disk, and name another file of
    the host in it as the base.  It cannot choose the name of the disk's file.

    Args:
        path: Path or URL of the file.
        name: Name of the file in the message.
        found: Format that was detected, ``raw`` included.
    """
    if found != "raw" and path.split("?", 1)[0].casefold().endswith(".raw"):
        _log.warning(
            "%s: found a %s image, although the name ends with .raw; it is read as an image "
            "(to read the bytes unchanged, state the format raw)",
            name,
            "QED" if found == "qed" else found,
        )


@asynccontextmanager
async def _qed_source(file: HostFile, path: str, options: OpenOptions) -> AsyncIterator[QedSource]:
    """Open the disk of the image in an open file; ``path`` is the path or URL of the file."""
    # Loading these modules takes time, and a raw source does not need them.
    from qedfuse.disk.opening import open_disk_in  # noqa: PLC0415  late, see above
    from qedfuse.tools.source.qedsource import QedSource  # noqa: PLC0415  late, see above

    async with open_disk_in(file, path, replace(options, writable=False)) as disk:
        yield QedSource(disk, path)
