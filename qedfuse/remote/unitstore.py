"""Where fetched units are kept: in the cache's file, or for a while in memory."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from qedfuse.remote.unitfile import UNIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.unitfile import UnitFile

_log = logging.getLogger(__name__)

_MAX_HELD_BYTES: Final = 16 << 20
"""Maximum memory for units that could not be stored in the cache, and that no reader waits for."""
_RETRY_BYTES: Final = 64 << 20
"""How many bytes are not stored for want of room before room is looked for again."""


class UnitStore:
    """Keeps the units of one object.

    Threads may use the object concurrently.

    Attributes:
        ready: For each unit 1 if its content is in the cache's file and was compared with its
            checksum, otherwise 0.  The object is never replaced.
    """

    def __init__(
        self, units: int, cache: UnitFile | None, make_room: Callable[[], int] | None
    ) -> None:
        """Keep units in ``cache``.

        Args:
            units: Number of units of the object.
            cache: Where units are kept, which the store closes; None for no place.
            make_room: Makes room in the cache; returns how many bytes may be stored before it must
                be called again, 0 for none.
        """
        self.ready = bytearray(units)
        self._cache = cache
        self._make_room = make_room
        self._room_lock = threading.Lock()  # held while room is made
        self._room_bytes = 0
        self._refused_bytes = _RETRY_BYTES  # not stored since room was looked for
        self._lock = threading.Lock()
        # All that follows is protected by the lock, as are changes of what precedes it.
        self._held: OrderedDict[int, Buffer] = OrderedDict()
        self._cannot_store = False
        self._is_closed = False

    @property
    def can_store(self) -> bool:
        """Whether the last unit was stored in the cache."""
        return self._cache is not None and not self._cannot_store

    def load(self, unit: int) -> bool:
        """Make a unit ready if it is intact in the cache; return whether it is ready."""
        if self.ready[unit]:
            return True
        cache = self._cache
        if cache is None or cache.load(unit) is None:
            return False
        return self._set_ready(unit, cache)

    def store(self, unit: int, block: Buffer) -> bool:
        """Store a unit in the cache and make it ready; return whether that was done."""
        cache = self._cache
        if cache is None:
            return False
        if not self._has_room(len(block)):
            self._record_refusal(cache, "no room is left")
            return False
        try:
            cache.store(unit, block)
        except OSError as error:
            if error.errno == errno.EBADMSG:
                self.discard()
            else:
                self._record_refusal(cache, os.strerror(error.errno or errno.EIO))
            return False
        with self._lock:
            self._cannot_store = False
        return self._set_ready(unit, cache)

    def held(self, unit: int) -> Buffer | None:
        """Return the content of a unit that is kept in memory; None if there is none."""
        with self._lock:
            block = self._held.get(unit)
            if block is not None:
                self._held.move_to_end(unit)
            return block

    def hold(self, blocks: dict[int, Buffer]) -> None:
        """Keep units in memory that could not be stored; those that were not used for long go."""
        with self._lock:
            if self._is_closed:
                return
            self._held.update(blocks)
            while len(self._held) * UNIT_BYTES > _MAX_HELD_BYTES:
                self._held.popitem(last=False)

    def discard(self) -> None:
        """Stop using the cache's file, because it has lost bytes that were in it."""
        with self._lock:
            cache, self._cache = self._cache, None
            self.ready[:] = bytes(len(self.ready))
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

    def _set_ready(self, unit: int, cache: UnitFile) -> bool:
        """Make a unit ready that is in ``cache``, unless that is discarded; return whether."""
        with self._lock:
            self.ready[unit] = self._cache is cache
            return bool(self.ready[unit])

    def _has_room(self, length: int) -> bool:
        """Return whether the cache has room for some bytes; if so, count them as stored."""
        if self._make_room is None:
            return True
        with self._room_lock:
            if length > self._room_bytes and self._refused_bytes >= _RETRY_BYTES:
                self._room_bytes = self._make_room()
            if length > self._room_bytes:
                self._refused_bytes = self._refused_bytes % _RETRY_BYTES + length
                return False
            self._room_bytes -= length
            self._refused_bytes = _RETRY_BYTES
            return True

    def _record_refusal(self, cache: UnitFile, reason: str) -> None:
        """Log that a unit cannot be stored, if the one before it could."""
        with self._lock:
            is_first = not self._cannot_store and not self._is_closed
            self._cannot_store = True
        if is_first:
            _log.warning("%s: cannot store in the cache: %s", cache.path, reason)
