"""The base that a commit writes to: finding its file, and opening it for writing."""

from __future__ import annotations

import shlex
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, cast

from qedfuse.disk.lookup.backing import closing_layers, open_bases, read_backing_name
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.foreignopening import refuse_foreign
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.errors import BackingError, ImageInUseError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.regular import identity_of
from qedfuse.ondisk.constants import SECTOR
from qedfuse.ondisk.formats import PROBE_BYTES, probed_format
from qedfuse.remote.address import require_local
from qedfuse.text import printable
from qedfuse.tools.common.writabledisk import open_writable

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.options import BackingPolicy, OpenOptions
    from qedfuse.hostio.hostfile import Buffer, HostFile
    from qedfuse.hostio.posixfile import PosixFile
    from qedfuse.ondisk.header import Header

COPY_CHUNK_BYTES: Final = 1 << 20
"""Maximum number of bytes that a commit copies to the base in one step."""

_VHD_MAGIC: Final = b"conectix"
"""The first bytes of the footer of a VHD image, which is its last sector."""


@dataclass(frozen=True, slots=True)
class BaseFile:
    """The file of a base, as it was found when the chain was read.

    Attributes:
        path: Path of the file.
        status: File attributes (stat(2)), to recognize the file when it is opened again.
        is_raw: Whether the base is raw.
        depth: Number of images over the base.
        declare_raw: The command that makes the image above the base declare it raw; empty if the
            image does so, or if the base is not raw.
    """

    path: str
    status: os.stat_result
    is_raw: bool
    depth: int
    declare_raw: str


class Base(Protocol):
    """A base that is open for writing."""

    @property
    def name(self) -> str:
        """Name of the base's file, for messages."""

    @property
    def size(self) -> int:
        """Size of the base's disk in bytes."""

    @property
    def free_clusters(self) -> int:
        """Number of clusters of the file that are known to be free; 0 for a raw base."""

    async def grow(self, size: int) -> None:
        """Grow the base's disk to ``size`` bytes; the added range reads as zeros."""

    async def write(self, start: int, data: Buffer) -> None:
        """Write bytes at a guest offset."""

    async def zero(self, start: int, length: int) -> None:
        """Make a range read as zeros, where possible without using space on the host."""

    async def flush(self) -> None:
        """Make all earlier changes durable."""

    async def autocompact(self) -> None:
        """Compact the file of a QED base as far as the options allow; skip a raw base."""


class _QedBase:
    """A base that is a QED image, which may itself have bases."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.name = disk.name

    @property
    def size(self) -> int:
        return self._disk.size

    @property
    def free_clusters(self) -> int:
        return self._disk.statistics().free_clusters or 0

    async def grow(self, size: int) -> None:
        await self._disk.grow(size)

    async def write(self, start: int, data: Buffer) -> None:
        await self._disk.write(start, data)

    async def zero(self, start: int, length: int) -> None:
        await self._disk.discard(start, length)

    async def flush(self) -> None:
        await self._disk.flush()

    async def autocompact(self) -> None:
        await self._disk.autocompact()


class _RawBase:
    """A raw base."""

    def __init__(self, file: PosixFile) -> None:
        self._file = file
        self.name = file.name
        self.free_clusters = 0

    @property
    def size(self) -> int:
        return self._file.size()

    async def grow(self, size: int) -> None:
        await self._file.truncate(size)

    async def write(self, start: int, data: Buffer) -> None:
        await self._file.pwrite(start, data)

    async def zero(self, start: int, length: int) -> None:
        await self._file.punch((start, length))
        if self._file.can_punch:
            return
        # The host's file system does not support holes.
        zeros, end = bytes(min(COPY_CHUNK_BYTES, length)), start + length
        for at in range(start, end, COPY_CHUNK_BYTES):
            await self._file.pwrite(at, memoryview(zeros)[: end - at])

    async def flush(self) -> None:
        await self._file.datasync()

    async def autocompact(self) -> None:
        pass


async def find_base(overlay: Disk, options: OpenOptions) -> BaseFile:
    """Open the chain of an overlay, close it again, and return the file of the overlay's base.

    No file is locked here: a second lock of the overlay could conflict with its first one.

    Raises:
        UsageError: The base is a URL, or an image that QEMU serves.
        BackingError: The overlay has no base, a base cannot be used, or the overlay's base is
            refused by `describe_base`.
        ImageInUseError: Another file has taken the overlay's name.
        QedError: A file of the chain cannot be opened or read.
    """
    with open_image_file(overlay.path, None) as file:
        check_same(overlay.path, file.stat(), overlay.fstat())
        header = await read_header(file)
        if not header.has_backing:
            msg = f"{overlay.name}: backing file: found none, expected one to commit to"
            raise BackingError(msg)
        name = await read_backing_name(file, header)
        require_local(backing_path(overlay.path, name, options.backing.working_directory))
        bases = await open_bases(
            overlay.path, file, header, replace(options, lock=False), make_store(1 << 20)
        )
        with closing_layers(bases):
            return await describe_base(bases[0], file, header, options.backing, 1)


async def describe_base(
    base: Layer, above: HostFile, header: Header, policy: BackingPolicy, depth: int
) -> BaseFile:
    """Return the file of a base; refuse a base that a commit cannot write to, or would destroy.

    A raw base that QEMU recognises as an image is refused, unless the image above declares it raw.
    A commit writes the bytes of the guest's disk over the header or the footer of such an image,
    after which no program can open it.

    The first bytes of a fixed VHD do not show its format, so it counts as raw, and only its footer
    is found here.  The policy's format applies to all bases.  So the user may have meant another
    base of the chain, which is not read any more: a raw base ends the chain.

    Args:
        base: The base.
        above: The file of the image that names the base.
        header: The header of this image; it may declare the base raw.
        policy: The policy, which may make all bases raw.
        depth: Number of images over the base.

    Raises:
        UsageError: QEMU serves the base.
        BackingError: The base is refused.
        QedError: A file cannot be read.
    """
    refuse_foreign(base)
    is_raw, declare_raw = isinstance(base, RawLayer), ""
    if is_raw and not header.backing_is_raw:
        name = shlex.quote(printable(await read_backing_name(above, header)))
        declare_raw = f"qedimg rebase -u -b {name} -F raw {shlex.quote(above.name)}"
        await _refuse_image_as_raw(base.file, policy, depth, declare_raw)
    file = cast("PosixFile", base.file)
    return BaseFile(file.path, file.stat(), is_raw, depth, declare_raw)


async def _refuse_image_as_raw(
    base: HostFile, policy: BackingPolicy, depth: int, declare_raw: str
) -> None:
    """Refuse a file that is an image for QEMU; for the arguments see `describe_base`."""
    hint = declare_raw
    image = probed_format(bytes(await base.pread(0, PROBE_BYTES)))
    if image is not None:
        found, expected = f"a {image} image", "raw"
    elif policy.format == "raw":
        return
    else:
        at = max(0, -(-base.size() // SECTOR) * SECTOR - SECTOR)
        if not (await base.pread(at, SECTOR)).startswith(_VHD_MAGIC):
            return
        found, expected = f"the footer of a fixed VHD image at {at}", "QED or raw"
        if depth == 1:
            hint = "backing_format=raw"
    msg = (
        f"{base.name}: found {found}, expected {expected} (to write to the file all the same: "
        f"{hint})"
    )
    raise BackingError(msg)


@asynccontextmanager
async def open_base(base_file: BaseFile, options: OpenOptions) -> AsyncIterator[Base]:
    """Open a base for writing; close the base at the end of the caller's ``with`` block.

    Args:
        base_file: The base.
        options: The options of the overlay; their `BackingPolicy.trusted` is ignored.

    Raises:
        BackingError: The chain below the base cannot be used.
        ImageInUseError: Another program has the base open, or another file has taken the
            base's name.
        QedError: The base cannot be opened for writing.
    """
    if base_file.is_raw:
        lock = LockMode.WRITE if options.lock else None
        with open_image_file(base_file.path, lock, writable=True) as file:
            check_same(base_file.path, file.stat(), base_file.status)
            yield _RawBase(file)
        return
    policy = replace(options.backing, trusted=None)
    async with open_writable(base_file.path, replace(options, backing=policy)) as disk:
        check_same(base_file.path, disk.fstat(), base_file.status)
        yield _QedBase(disk)


def check_same(path: str, found: os.stat_result, expected: os.stat_result) -> None:
    """Check that a path has led to the same file each time that it was opened.

    If the overlay or the base was replaced, a commit could change the wrong file.

    Raises:
        ImageInUseError: The two files are not the same.
    """
    if identity_of(found) != identity_of(expected):
        msg = f"{printable(path)}: found another file than when the path was opened before"
        raise ImageInUseError(msg)
