"""The gate before every change: closed on a disk that is read-only, and held by the first one.

What an image says of itself may stop being true with the first change: autoclear bits of
features that we do not know, and the saved free list.  That it says so must be durably
gone before anything else changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.errors import ReadOnlyError

if TYPE_CHECKING:
    from qedfuse.disk.state.persistentfreelist import PersistentFreeList
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile


class FirstWriteGuard:
    """Lets changes through.

    Attributes:
        passed: Whether nothing is left that a change would make untrue.
        saved_list: Forgotten with the first change.
    """

    def __init__(
        self, file: HostFile, header_store: HeaderStore, writeback: MetadataWriteback
    ) -> None:
        """Guard modifications of an image."""
        self._file = file
        self._header_store = header_store
        self._writeback = writeback
        self._first = trio.Lock()
        self.passed = not (header_store.value.stale_autoclear or header_store.value.free_list)
        self.persistent_free_list: PersistentFreeList | None = None

    async def prepare_write(self) -> None:
        """Refuse a change if the disk is read-only; clear what the first one makes untrue.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: What the first change makes untrue could not be cleared.
        """
        if not self._file.writable or self._writeback.failure is not None:
            why = self._writeback.failure or "opened read-only"
            msg = f"{self._file.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self.passed:
            async with self._first:
                # All writers wait here for the first one: not even data may change
                # before the program that owns the autoclear bits can tell, and before
                # the saved free list is invalid.
                if not self.passed:
                    await self._header_store.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._writeback.barrier()
                    if self.persistent_free_list is not None:
                        await self.persistent_free_list.forget()
                    self.passed = True
