"""The first-write guard: before the first modification an image withdraws its claims.

Two things in a header claim something about the rest of the image, which the first
modification may make untrue: autoclear feature bits of extensions that this program does not
know, and the bit of a free list.  These claims must be durably withdrawn before anything else
in the image changes, data included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.errors import ReadOnlyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile


class FirstWriteGuard:
    """Prepares an image for its first modification; further ones pass immediately.

    Attributes:
        prepared: Whether the image makes no claim, or no more, that a modification could
            make untrue.
    """

    def __init__(
        self,
        file: HostFile,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        hooks: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """Guard modifications of ``file``.

        All ``hooks`` are awaited, in their order, when the claims have been durably withdrawn
        and before the first modification passes.  If a hook raises, the next caller awaits
        all of them again.
        """
        self._file = file
        self._header_store = header_store
        self._writeback = writeback
        self._hooks = hooks
        self._first = trio.Lock()
        self.prepared = not (header_store.value.stale_autoclear or header_store.value.free_list)

    async def prepare_write(self) -> None:
        """Return when the image may be modified: immediately, except for the first time.

        Raises:
            ReadOnlyError: The disk is open read-only, or became read-only after an error.
            HostError: The claims could not be withdrawn; the caller must modify nothing.
        """
        if not self._file.writable or self._writeback.failure is not None:
            why = self._writeback.failure or "opened read-only"
            msg = f"{self._file.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self.prepared:
            async with self._first:
                # All writers wait for the lock while the first one withdraws the claims.
                # Not even data may change earlier: if power fails, the cleared autoclear
                # bits must show their owner that the image has changed, and the free list
                # must be invalid.
                if not self.prepared:
                    await self._header_store.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._writeback.barrier()
                    for hook in self._hooks:
                        await hook()
                    self.prepared = True
