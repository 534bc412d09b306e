"""Giving an overlay another base, while its content stays what it was.

Where the image itself has nothing, its base shows.  So wherever the new base shows
something else than the old one, the old content is put into the image first, while it
still names the old base: until the name changes the disk reads the same over the old
base, and from then on over the new one.  The name changes in one step, after all the
rest is durable.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.creation.newheader import backing_name
from qedfuse.disk.lookup.backing import open_bases
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.seek import next_data
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import BackingError, UsageError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import Feature
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import refuse_backing_loop
from qedfuse.tools.editing.ownextents import batch_starts, own_extents

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Literal

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent

    Progress = Callable[[int, int], None]

_COMPARE_CHUNK_BYTES: Final = 1 << 20
"""Bytes that are compared at a time."""


@dataclass(frozen=True, slots=True)
class RebaseResult:
    """What rebasing came to.

    Attributes:
        backing: The name of the base, as it is stored now; None if there is none.
        backing_format: What the base is.
        copied_bytes: How much the image took over as data.
        zero_bytes: How much it took over as clusters of zeros.
    """

    backing: str | None
    backing_format: str | None
    copied_bytes: int = 0
    zero_bytes: int = 0


async def rebase(
    path: str,
    backing: str | None,
    *,
    backing_format: Literal["raw", "qed"] | None = None,
    unsafe: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> RebaseResult:
    """Give an image another base, or none.

    Args:
        path: The image.
        backing: The base, by a name that is absolute or begins at the image's directory;
            None or empty for none.
        backing_format: What the base is; may be left out if it is QED and looked at.
        unsafe: Change the name and nothing else; neither base need be there.
        options: How to open it; it is opened for writing in any case.  The new base is
            trusted, as the user names it himself.
        progress: Called with the bytes of the disk that are done, and how many it has.

    Raises:
        UsageError: The name cannot be stored, or the format of the base must be given.
        BackingError: A base is missing, not what it is said to be, or the image itself.
        QedError: The image cannot be opened for writing, or the host refused.  Its
            content is the same, whichever base it names.
    """
    backing = backing or None
    name = backing_name(backing)
    wanted = replace(options or OpenOptions(), writable=True)
    if unsafe:
        if backing is not None and backing_format is None:
            raise UsageError(_no_format(path, backing))
        if backing is not None:
            refuse_backing_loop(path, backing, wanted.backing.working_directory)
        async with open_disk(path, wanted, inspector=inspect_image, with_bases=False) as disk:
            await disk.set_backing(name, raw=backing_format == "raw")
        return RebaseResult(backing, backing_format if backing else None)
    async with (
        open_disk(path, wanted, inspector=inspect_image) as disk,
        _new_chain(disk, backing, backing_format, wanted) as chain,
    ):
        work = _Rebasing(disk, chain)
        await work.run(progress)
        raw = chain.has_base and isinstance(chain.layers[1], RawLayer)
        await disk.set_backing(name, raw=raw)
        if progress is not None:
            progress(disk.size, disk.size)
    found = "raw" if raw else "qed"
    return RebaseResult(backing, found if backing else None, work.copied, work.zeroes)


@asynccontextmanager
async def _new_chain(
    disk: Disk,
    backing: str | None,
    backing_format: Literal["raw", "qed"] | None,
    options: OpenOptions,
) -> AsyncIterator[Chain]:
    """Open the image's future chain, of which the bases alone are looked at.

    Raises:
        BackingError: The new base cannot be used, or leads back to the image.
        UsageError: The base is raw, and nobody said so.
    """
    top = disk.chain.layers[0]
    if backing is None:
        yield Chain([top])
        return
    features = int(Feature.BACKING_FILE)
    if backing_format == "raw":
        features |= int(Feature.BACKING_FORMAT_NO_PROBE)
    header = replace(disk.header, features=features, backing_filename_size=len(backing))
    base = backing_path(disk.path, backing, options.backing.working_directory)
    # What -F says is about this base; what the user says about all bases was about the
    # old ones.
    policy = replace(options.backing, trusted=base, format=None)
    image = PosixFile.open(disk.path)
    try:
        # Loops are found before locks, in which we would be in our own way.
        bases = await open_bases(
            disk.path,
            image,
            header,
            replace(options, backing=policy, writable=False),
            make_store(options.cache_bytes),
            name=backing,
        )
    finally:
        image.close()
    try:
        if isinstance(bases[0], RawLayer) and backing_format != "raw":
            if backing_format is None:
                raise UsageError(_no_format(disk.path, backing))
            msg = (
                f"{disk.name}: backing file {bases[0].file.name}: found no QED magic, expected "
                "a QED image"
            )
            raise BackingError(msg)
        yield Chain([top, *bases])
    finally:
        for layer in bases:
            layer.file.close()


def _no_format(path: str, backing: str) -> str:
    """Say that the format of a base must be given."""
    return (
        f"{printable(path)}: backing file {printable(backing)}: found no format, expected -F raw "
        "or -F qed"
    )


class _Rebasing:
    """Puts into an image what its new base does not show.

    Attributes:
        copied: Bytes that were written to the image.
        zeroes: Bytes that became clusters of zeros.
    """

    def __init__(self, disk: Disk, new: Chain) -> None:
        """Look through ``disk`` at its old bases, and through ``new`` at the others."""
        self._disk = disk
        self._old = disk.chain
        self._new = new
        self._below = [Chain(chain.layers[1:]) for chain in (self._old, new) if chain.has_base]
        self._data_at = [-1] * len(self._below)
        self._unit = max(_COMPARE_CHUNK_BYTES, disk.header.geometry.cluster_size)
        self.copied = 0
        self.zeroes = 0

    async def run(self, progress: Progress | None) -> None:
        """Go through all that the image itself does not have.

        Raises:
            CorruptImageError: A table entry of the image or of a base is bad.
            HostError: The host refused.
        """
        for start in batch_starts(self._disk):
            for extent in await own_extents(self._disk, start):
                if progress is not None:
                    progress(extent.start, self._disk.size)
                if extent.kind is Kind.UNALLOCATED:
                    await self._look_below(extent, progress)

    async def _look_below(self, extent: Extent, progress: Progress | None) -> None:
        """Go through a range in which the bases show."""
        at = await self._next_shown(extent.start)
        while at < extent.end:
            stop = min(extent.end, at - at % self._unit + self._unit)
            if not await self._is_same_place(at, stop):
                await self._compare(at, stop)
            if progress is not None:
                progress(stop, self._disk.size)
            at = await self._next_shown(stop)

    async def _next_shown(self, start: int) -> int:
        """Find the first cluster at or past one in which either base has data."""
        for place, chain in enumerate(self._below):
            # What was found for an earlier cluster may lie far ahead, and is still true.
            if self._data_at[place] < start:
                found = await next_data(chain, start)
                self._data_at[place] = self._disk.size if found is None else found
        first = min(self._data_at, default=self._disk.size)
        return max(start, self._disk.header.geometry.floor(first))

    async def _is_same_place(self, start: int, end: int) -> bool:
        """Tell whether both chains show the same bytes of the same file; then none is read."""
        old = await self._old.extents(start, end - start, depth=1)
        new = await self._new.extents(start, end - start, depth=1)
        return len(old) == len(new) and all(
            one.kind is other.kind is Kind.DATA
            and (one.start, one.length, one.file_offset)
            == (other.start, other.length, other.file_offset)
            and os.path.samestat(
                self._old.layers[one.depth].file.stat(), self._new.layers[other.depth].file.stat()
            )
            for one, other in zip(old, new, strict=True)
        )

    async def _compare(self, start: int, end: int) -> None:
        """Compare whole clusters, all unallocated, within one unit; take over what differs."""
        size = self._disk.header.geometry.cluster_size
        if size > _COMPARE_CHUNK_BYTES:
            await self._compare_cluster(start, end)
            return
        old = await self._old.read(start, end - start, depth=1)
        new = await self._new.read(start, end - start, depth=1)
        if old == new:
            return
        data, zeros = memoryview(old), bytes(size)
        run, was_zero = start, None
        # One more cluster, past the last, ends the last run.
        for at in range(start, end + size, size):
            part = old[at - start : at - start + size]
            differs = at < end and part != new[at - start : at - start + size]
            is_zero = part == zeros[: len(part)] if differs else None
            if is_zero is not was_zero:
                if was_zero is not None:
                    await self._take_over(run, data[run - start : at - start], zero=was_zero)
                run, was_zero = at, is_zero

    async def _take_over(self, start: int, data: memoryview, *, zero: bool) -> None:
        """Put the old content into clusters of the image."""
        if zero:
            await self._disk.write_zero_clusters(start, len(data))
            self.zeroes += len(data)
        else:
            await self._disk.write(start, data)
            self.copied += len(data)

    async def _compare_cluster(self, start: int, end: int) -> None:
        """Compare one large cluster; memory is for a piece of it at a time."""
        different, zero = False, True
        for at in range(start, end, _COMPARE_CHUNK_BYTES):
            length = min(_COMPARE_CHUNK_BYTES, end - at)
            old = await self._old.read(at, length, depth=1)
            new = await self._new.read(at, length, depth=1)
            different = different or old != new
            zero = zero and old == bytes(length)
        if different and zero:
            await self._disk.write_zero_clusters(start, end - start)
            self.zeroes += end - start
        elif different:
            # A new cluster gets the rest of its content from the old base.
            await self._disk.write(start, await self._old.read(start, 512, depth=1))
            self.copied += end - start
        await trio.lowlevel.checkpoint()
