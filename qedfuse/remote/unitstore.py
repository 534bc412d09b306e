"""Where fetched units are kept: in the cache's file, or for a while in memory."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from qedfuse.remote.cacheentry import mark_usable_offline
from qedfuse.remote.cachespace import CacheSpace
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.remote.zeroblocks import ZeroBlocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.unitfile import UnitFile

_log = logging.getLogger(__name__)

_MAX_HELD_BYTES: Final = 16 << 20
"""Maximum memory for units that could not be stored in the cache, and that no reader waits for."""
_MAX_CLEARED_UNITS: Final = 1 << 16
"""How many units are made not ready in one step, which takes as many bytes of memory."""


class UnitStore:
    """Keeps the units of one object.

    Threads may use the object concurrently.

    Attributes:
        ready: For each unit 1 if its content was compared with its checksum, and no byte of it was
            missing in the page cache since, otherwise 0.  The object is never replaced.
        zeros: The blocks that are known to be zeros.
    """

    def __init__(
        self, units: int, cache: UnitFile | None, evict: Callable[[int], int] | None
    ) -> None:
        """Keep units in ``cache``.

        Args:
            units: Number of units of the object.
            cache: Where units are kept, which the store closes; None for no place.
            evict: Makes room in the cache (`CacheDirectory.evict`); None for no limit.
        """
        self.ready = bytearray(units)
        self.zeros = ZeroBlocks(units if cache is not None else 0)
        self._cache = cache
        self._space: CacheSpace | None = None
        if cache is not None and evict is not None:
            self._space = CacheSpace(lambda: evict(cache.unlinked_bytes()))
        self._lock = threading.Lock()
        # All that follows is protected by the lock, as are changes of what precedes it.
        self._held: OrderedDict[int, Buffer] = OrderedDict()
        self._cannot_store = False
        self._is_closed = False
        self._forgotten = 0  # how often `forget` was called

    @property
    def can_store(self) -> bool:
        """Whether the last unit was stored in the cache."""
        return self._cache is not None and not self._cannot_store

    def load(self, unit: int) -> bytes | None:
        """Return a unit that is intact in the cache, and make it ready; None if it is not."""
        cache = self._cache
        forgotten = self._forgotten
        content = None if cache is None else cache.load(unit)
        if cache is None or content is None:
            return None
        self.zeros.record(unit, content)
        self._set_ready(unit, cache, forgotten)
        return content

    def store(self, unit: int, block: Buffer) -> bool:
        """Store a unit in the cache and make it ready; return whether that was done."""
        cache = self._cache
        forgotten = self._forgotten
        if cache is None:
            return False
        try:
            with self._space.reserve(len(block)) if self._space else nullcontext("") as reason:
                if reason:
                    self._record_refusal(cache, reason)
                    return False
                cache.store(unit, block)
        except OSError as error:
            if error.errno == errno.EBADMSG:
                self.discard()
            else:
                self._record_refusal(cache, os.strerror(error.errno or errno.EIO))
            return False
        self.zeros.record(unit, block)
        with self._lock:
            self._cannot_store = False
        return self._set_ready(unit, cache, forgotten)

    def is_stored(self, first: int, last: int) -> bool:
        """Return whether the cache claims to have some adjacent units."""
        cache = self._cache
        try:
            return cache is not None and cache.count_present(first, last) == last + 1 - first
        except OSError:
            return False

    def mark_usable_offline(self) -> bool:
        """Note that the cache has all units that readers need; return whether that was done."""
        cache = self._cache
        return cache is not None and mark_usable_offline(cache)

    @property
    def is_evicting(self) -> bool:
        """Whether room is being made, so that what is held could be stored soon."""
        return self._space is not None and self._space.is_evicting

    def store_held(self, first: int, last: int) -> bool:
        """Store those of some adjacent units that are held; return `is_stored` of all."""
        for unit in range(first, last + 1):
            block = self.held(unit)
            if block is not None and not self.is_stored(unit, unit):
                self.store(unit, block)
        return self.is_stored(first, last)

    def forget(self, first: int, last: int) -> None:
        """Make adjacent units not ready, because a byte of them was not in the page cache.

        What the kernel now reads from the disk was not compared with a checksum.
        """
        with self._lock:
            self._forgotten += 1
            self.ready[first : last + 1] = bytes(last + 1 - first)

    def held(self, unit: int) -> Buffer | None:
        """Return the content of a unit that is kept in memory; None if there is none."""
        with self._lock:
            block = self._held.get(unit)
            if block is not None:
                self._held.move_to_end(unit)
            return block

    def hold(self, unit: int, block: Buffer) -> None:
        """Keep a unit in memory that could not be stored; those that were not used for long go."""
        with self._lock:
            if self._is_closed:
                return
            self._held[unit] = bytes(block)  # a copy, which keeps no other unit in memory
            while len(self._held) * UNIT_BYTES > _MAX_HELD_BYTES:
                self._held.popitem(last=False)

    def discard(self) -> None:
        """Stop using the cache's file, because it has lost bytes that were in it."""
        with self._lock:
            cache, self._cache = self._cache, None
            for first in range(0, len(self.ready), _MAX_CLEARED_UNITS):
                part = self.ready[first : first + _MAX_CLEARED_UNITS]
                self.ready[first : first + len(part)] = bytes(len(part))
            is_closed = self._is_closed
        if cache is not None:
            if not is_closed:
                _log.warning("%s: the cache was damaged; going on without it", cache.path)
            cache.close()

    def close(self) -> None:
        """Close the cache and forget what is held; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            self._held.clear()
            cache = self._cache
        if cache is not None:
            cache.close()

    def _set_ready(self, unit: int, cache: UnitFile, forgotten: int) -> bool:
        """Make a unit ready that was read or written; return False if ``cache`` is discarded.

        The unit does not become ready if `forget` was called since ``forgotten`` was read, because
        that call may have been about this unit.
        """
        with self._lock:
            is_used = self._cache is cache
            self.ready[unit] = is_used and self._forgotten == forgotten
            return is_used

    def _record_refusal(self, cache: UnitFile, reason: str) -> None:
        """Log that a unit cannot be stored, if the one before it could."""
        with self._lock:
            is_first = not self._cannot_store and not self._is_closed
            self._cannot_store = True
        if is_first:
            _log.warning("%s: cannot store in the cache: %s", cache.path, reason)
