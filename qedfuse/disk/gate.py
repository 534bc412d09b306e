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
    from qedfuse.disk.commit import Commit
    from qedfuse.disk.liveheader import LiveHeader
    from qedfuse.disk.savedlist import SavedList
    from qedfuse.hostio.hostfile import HostFile


class Gate:
    """Lets changes through.

    Attributes:
        passed: Whether nothing is left that a change would make untrue.
        saved_list: Forgotten with the first change.
    """

    def __init__(self, file: HostFile, live: LiveHeader, commit: Commit) -> None:
        """Stand before the changes of an image; `saved_list` must be set before the first."""
        self._file = file
        self._live = live
        self._commit = commit
        self._first = trio.Lock()
        self.passed = not (live.value.stale_autoclear or live.value.free_list)
        self.saved_list: SavedList | None = None

    async def before_change(self) -> None:
        """Refuse a change if the disk is read-only; clear what the first one makes untrue.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: What the first change makes untrue could not be cleared.
        """
        if not self._file.writable or self._commit.failure is not None:
            why = self._commit.failure or "opened read-only"
            msg = f"{self._file.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self.passed:
            async with self._first:
                # All writers wait here for the first one: not even data may change
                # before the program that owns the autoclear bits can tell, and before
                # the saved free list is invalid.
                if not self.passed:
                    await self._live.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._commit.barrier()
                    if self.saved_list is not None:
                        await self.saved_list.forget()
                    self.passed = True
