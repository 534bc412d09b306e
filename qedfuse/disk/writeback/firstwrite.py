"""The first-write guard: before the first modification an image withdraws its claims.

Two kinds of bits in a header claim something about the rest of the image: the autoclear feature
bits of extensions that this program does not know, and the bit of a free list.  The first
modification may make these claims untrue.  So the bits must be durably clear before anything else
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
    """Prepares an image for its first modification, once.

    Attributes:
        prepared: Whether the image may be modified without further preparation.
    """

    def __init__(
        self,
        file: HostFile,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        hooks: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """Guard modifications of ``file``.

        If there are claims to withdraw, the first call of `prepare_write` durably withdraws them,
        and then awaits all ``hooks``, in their order.  If a hook raises, the next call awaits all
        hooks again.  Without claims no hook is called.
        """
        self._file = file
        self._header_store = header_store
        self._writeback = writeback
        self._hooks = hooks
        self._lock = trio.Lock()
        self.prepared = not (header_store.value.stale_autoclear or header_store.value.has_free_list)

    async def prepare_write(self) -> None:
        """Return when the image may be modified, which is immediately if `prepared` is True.

        Raises:
            ReadOnlyError: The disk is open read-only, or became read-only after an error.
            HostError: The claims could not be withdrawn, or a hook failed.  The caller must
                modify nothing.
        """
        if not self._file.writable or self._writeback.failure is not None:
            why = self._writeback.failure or "opened read-only"
            msg = f"{self._file.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self.prepared:
            async with self._lock:
                # All writers wait while the first one withdraws the claims.  Power may fail after
                # any change, even of data, and must not leave a claim that the change made untrue.
                # An unknown autoclear bit claims that only programs that know the bit have changed
                # the image.
                if not self.prepared:
                    await self._header_store.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._writeback.barrier()
                    for hook in self._hooks:
                        await hook()
                    self.prepared = True
