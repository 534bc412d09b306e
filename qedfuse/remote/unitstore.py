"""The storage of fetched units: in the cache, or the latest of them in memory."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError
from qedfuse.remote.cachemetadata import mark_usable_offline
from qedfuse.remote.cachespace import CacheSpace
from qedfuse.remote.unitfile import UNIT_BYTES, blocks_of, units_of
from qedfuse.remote.zeroblocks import ZeroBlocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.unitfile import UnitFile

_log = logging.getLogger(__name__)

_MAX_HELD_BYTES: Final = 16 << 20
"""Maximum memory for units that could not be stored in the cache."""
_MAX_CLEARED_UNITS: Final = 1 << 16
"""Maximum number of units that `UnitStore.discard` makes not ready in one step, to save memory."""


class UnitStore:
    """Keeps the units of one remote object.

    Threads may use the store concurrently.

    Attributes:
        ready: A byte for each unit, which is not 0 if the unit may be read from the page cache
            (`CheckedUnits.ready`).  A unit becomes ready when it has been stored, or compared with
            its checksum.  It becomes not ready when a read misses a byte in the page cache, when a
            write of the unit begins, and when the cache is discarded.  The fetcher also clears the
            byte of a unit whose read must start the next fetch.  Always the same bytearray.
        zeros: The blocks that are known to be zeros.
    """

    def __init__(
        self, units: int, cache: UnitFile | None, evict: Callable[[UnitFile], int] | None
    ) -> None:
        """Make a store that keeps units in ``cache``; no unit is ready yet.

        Args:
            units: Number of units of the object.
            cache: The entry of the cache, which the store closes; None for no cache.
            evict: Removes other entries of the cache (`CacheDirectory.evict`); None if the size of
                the cache is not limited.
        """
        self.ready = bytearray(units)
        self.zeros = ZeroBlocks(units if cache is not None else 0)
        self._cache = cache
        self._space: CacheSpace | None = None
        if cache is not None and evict is not None:
            self._space = CacheSpace(lambda: evict(cache))
        self._lock = threading.Lock()
        # The lock protects the attributes below, and the changes that this object makes to `ready`
        # and `_cache`.
        self._held: OrderedDict[int, Buffer] = OrderedDict()
        self._cannot_store = False
        self._is_closed = False
        self._forgotten = 0  # how often `forget` was called

    @property
    def has_cache(self) -> bool:
        """Whether there is an entry of the cache, even if the cache is full at the moment."""
        return self._cache is not None

    @property
    def can_store(self) -> bool:
        """Whether there is a cache, and the last attempt to store units in it has not failed."""
        return self._cache is not None and not self._cannot_store

    def load(self, unit: int) -> bytes | None:
        """Return a unit from the cache, and make it ready; None if it is missing or damaged.

        The unit does not become ready if `forget` was called meanwhile.
        """
        cache = self._cache
        forgotten = self._forgotten
        content = None if cache is None else cache.load(unit)
        if cache is None or content is None:
            return None
        self.zeros.record(unit, content)
        self._set_ready(unit, 1, cache, forgotten)
        return content

    def store(self, first: int, content: Buffer) -> bool:
        """Store adjacent units in the cache, and make them ready; return whether they are stored.

        The units do not become ready if `forget` was called meanwhile.
        """
        cache = self._cache
        forgotten = self._forgotten
        count = units_of(len(content))
        if cache is None:
            return False
        with self._lock:
            # A unit must not be ready while its pages are written to, or after a failed write.
            self.ready[first : first + count] = bytes(count)
        try:
            with self._space.reserve(len(content)) if self._space else nullcontext("") as reason:
                if reason:
                    self._record_refusal(cache, reason)
                    return False
                cache.store(first, content)
        except OSError as error:
            if error.errno == errno.EBADMSG:
                self.discard()
            else:
                self._record_refusal(cache, os.strerror(error.errno or errno.EIO))
            return False
        for unit, block in blocks_of(first, content):
            self.zeros.record(unit, block)
        with self._lock:
            self._cannot_store = False
        return self._set_ready(first, count, cache, forgotten)

    def is_stored(self, first: int, last: int) -> bool:
        """Return whether all units ``first`` to ``last`` are stored in the cache."""
        cache = self._cache
        try:
            return cache is not None and cache.has_units(b"\1" * (last + 1 - first), first)
        except OSError:
            return False

    def has_any(self, first: int, last: int) -> bool:
        """Return whether one of the units ``first`` to ``last`` is stored in the cache."""
        cache = self._cache
        try:
            return cache is not None and cache.has_any(first, last)
        except OSError:
            return False

    def mark_usable_offline(self, needed: bytes) -> bool:
        """Record that the cache has all units that readers need; return whether it was recorded.

        ``needed`` has a byte for each unit: 1 if readers need it, else 0.  A failure is logged.
        """
        cache = self._cache
        if cache is None:
            return False
        try:
            mark_usable_offline(cache, needed)
        except HostError as error:
            with self._lock:
                is_closed = self._is_closed
            if not is_closed:
                _log.warning("%s; not recorded as usable without a server", error)
            return False
        return True

    @property
    def is_evicting(self) -> bool:
        """Whether an eviction is running; if so, units in memory can perhaps be stored soon."""
        return self._space is not None and self._space.is_evicting

    def store_held(self, first: int, last: int) -> bool:
        """Store the held units of a range; return whether all units of it are then stored."""
        for unit in range(first, last + 1):
            block = self.held(unit)
            if block is not None and not self.is_stored(unit, unit):
                self.store(unit, block)
        return self.is_stored(first, last)

    def forget(self, first: int, last: int) -> None:
        """Make adjacent units not ready, because one of their bytes was not in the page cache.

        The kernel may now read the missing bytes from the disk.  If the units stayed ready, these
        bytes would be used without a comparison with the checksum.
        """
        with self._lock:
            self._forgotten += 1
            self.ready[first : last + 1] = bytes(last + 1 - first)

    def held(self, unit: int) -> Buffer | None:
        """Return the content of a unit that is held in memory; None if the unit is not held."""
        with self._lock:
            block = self._held.get(unit)
            if block is not None:
                self._held.move_to_end(unit)
            return block

    def hold(self, unit: int, block: Buffer) -> None:
        """Hold a unit in memory; drop the least recently used units beyond `_MAX_HELD_BYTES`."""
        with self._lock:
            if self._is_closed:
                return
            self._held[unit] = bytes(block)  # a copy: the block is a part of a longer buffer
            while len(self._held) * UNIT_BYTES > _MAX_HELD_BYTES:
                self._held.popitem(last=False)

    def discard(self) -> None:
        """Stop using the entry of the cache, whose data file another program has truncated."""
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
        """Close the entry of the cache, and drop the held units; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            self._held.clear()
            cache = self._cache
        if cache is not None:
            cache.close()

    def _set_ready(self, first: int, count: int, cache: UnitFile, forgotten: int) -> bool:
        """Make units ready after a read or write; return False if ``cache`` was discarded.

        ``forgotten`` is `_forgotten` before the units were read or written.  If `forget` was called
        since then, they do not become ready.
        """
        with self._lock:
            is_used = self._cache is cache
            is_ready = is_used and self._forgotten == forgotten
            self.ready[first : first + count] = bytes([is_ready]) * count
            return is_used

    def _record_refusal(self, cache: UnitFile, reason: str) -> None:
        """Log why units cannot be stored, at the first refusal since the last success."""
        with self._lock:
            is_first = not self._cannot_store and not self._is_closed
            self._cannot_store = True
        if is_first:
            _log.warning("%s: cannot store in the cache: %s", cache.path, reason)
