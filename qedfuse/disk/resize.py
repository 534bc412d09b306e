"""Making the disk larger: what is added reads as zeros, whatever a base or the file holds there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.disk.extents import Kind
from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.ondisk.constants import SECTOR

if TYPE_CHECKING:
    from qedfuse.disk.allocator import Allocator
    from qedfuse.disk.chain import Chain
    from qedfuse.disk.commit import Commit
    from qedfuse.disk.layer import QedLayer
    from qedfuse.disk.liveheader import LiveHeader
    from qedfuse.disk.requests import Requests


class Resizing:
    """Gives a disk a new size.

    Attributes:
        lock: Held while the size changes, and by whoever needs it to stay.
    """

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        requests: Requests,
        commit: Commit,
        live: LiveHeader,
        allocator: Allocator,
    ) -> None:
        """Work on ``layer``, the top of ``chain``."""
        self._chain = chain
        self._layer = layer
        self._requests = requests
        self._commit = commit
        self._live = live
        self._allocator = allocator
        self.lock = trio.Lock()

    def check(self, size: int) -> None:
        """Refuse a size that the disk cannot have.

        Raises:
            UsageError: It would shrink, or the tables cannot address that much.
        """
        name, old, most = (
            self._layer.file.name,
            self._layer.size,
            self._layer.geometry.max_image_size,
        )
        if size < old:
            msg = f"{name}: size: found {size}, expected at least {old}: no shrinking"
            raise UsageError(msg)
        if size % SECTOR or size > most:
            msg = f"{name}: size: found {size}, expected a multiple of {SECTOR} up to {most}"
            raise UsageError(msg)

    async def resize(self, size: int) -> None:
        """Give the disk a size that `check` has let through.

        Raises:
            CorruptImageError: Table entries past the end are in use.
            HostError: The host refused; the disk has its old size.
        """
        async with self.lock:
            if size <= self._layer.size:
                return
            await self._blank_past_end(size)
            # What hides the base and old bytes must be durable before the new size is.
            await self._commit.barrier()
            await self._live.change(lambda header: header.with_size(size))
            self._layer.header = self._live.value
            self._allocator.set_size(self._live.value)
            await self._commit.barrier()

    async def _blank_past_end(self, size: int) -> None:
        """Make the range from the disk's end to ``size`` read as zeros once it belongs to it.

        The last cluster may hold bytes past the end, and a base that is longer than the
        disk would show through behind it.
        """
        geometry = self._layer.geometry
        old, past = self._layer.size, geometry.ceil(self._layer.size)
        reaches = max((base.size for base in self._chain.layers[1:]), default=0)
        if past < size:
            for extent in await self._layer.lookup(past, size - past):
                if extent.kind in (Kind.DATA, Kind.BAD):
                    msg = (
                        f"{self._layer.file.name}: resize: found table entries for "
                        f"{extent.start}, past the end of the disk at {old}, expected none: the "
                        "image must be repaired first"
                    )
                    raise CorruptImageError(msg)
        if old < past:
            await self._requests.blank(old, min(past, size))
        if past < min(size, reaches):
            await self._requests.set_zero(past, geometry.ceil(min(size, reaches)))
