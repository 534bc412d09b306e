"""The guard before every modification: it makes durable what must change first.

An image makes claims that its first modification may invalidate: autoclear feature bits
of extensions that this program does not know, and a free list.  The claims must be
durably withdrawn before anything else in the image changes, data included.
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
    """Lets modifications of an image pass, and prepares the image for the first one.

    Attributes:
        prepared: Whether the image makes no claim any more that a modification could
            invalidate.
    """

    def __init__(
        self,
        file: HostFile,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        hooks: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """Guard modifications of ``file``.

        Each of ``hooks`` is awaited once, in order, when the header has durably withdrawn
        its claims and before the first modification passes.
        """
        self._file = file
        self._header_store = header_store
        self._writeback = writeback
        self._hooks = hooks
        self._first = trio.Lock()
        self.prepared = not (header_store.value.stale_autoclear or header_store.value.free_list)

    async def prepare_write(self) -> None:
        """Return when the image may be modified.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The header could not be changed; nothing else may be modified.
        """
        if not self._file.writable or self._writeback.failure is not None:
            why = self._writeback.failure or "opened read-only"
            msg = f"{self._file.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self.prepared:
            async with self._first:
                # All writers wait here for the first one.  Not even data may change
                # before the program that owns the autoclear bits can see that, and
                # before the free list is invalid.
                if not self.prepared:
                    await self._header_store.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._writeback.barrier()
                    for hook in self._hooks:
                        await hook()
                    self.prepared = True
