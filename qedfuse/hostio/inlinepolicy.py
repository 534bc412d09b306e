"""Which calls that change a file the event loop makes itself, and which go to a worker thread.

A round trip to a worker thread costs more than a copy of some 100 KiB into the page cache,
or than a datasync on a fast disk.  But a call that blocks the event loop stops all requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from qedfuse.hostio.inodelock import InodeLock

INLINE_WRITE_BYTES: Final = 1 << 18
"""Writes up to this length are short: the copy to the page cache costs less than a round trip
to a worker thread."""
MAX_INLINE_WRITE_BYTES: Final = 1 << 20
"""Writes up to this length are short as long as the host takes them within `_INLINE_SECONDS`.
When the host's memory is full of dirty pages, the kernel makes writers wait."""
_INLINE_SECONDS: Final = 1e-3
"""A call that took no longer the last times may block the event loop."""
_THROTTLED_SECONDS: Final = 8e-3
"""A short write that takes longer may have been throttled: the kernel's shortest pause for a
task that dirties pages faster than the disk takes them is 10 ms."""
_MAX_INLINE_DATASYNC_BYTES: Final = 1 << 21
"""Bytes that may have been written since the last datasync for the next one to be inline."""


class InlinePolicy:
    """Decides for one file, from how long its last calls took and from its `InodeLock`."""

    def __init__(self, inode: InodeLock) -> None:
        """Decide for the file with this inode; no call has been made yet."""
        self._inode = inode
        self._long_writes = AdaptivePoll(_INLINE_SECONDS, start_enabled=True)
        self._datasyncs = AdaptivePoll(_INLINE_SECONDS)
        self._unsynced_bytes = 0  # written since the last datasync began

    def is_short(self, length: int) -> bool:
        """Return whether a write of ``length`` bytes costs less than a round trip to a thread."""
        return length <= INLINE_WRITE_BYTES or (
            length <= MAX_INLINE_WRITE_BYTES and self._long_writes.seconds > 0
        )

    def can_write_inline(self, length: int) -> bool:
        """Return whether the event loop may write ``length`` bytes itself now."""
        return (not self._inode.holders or self._inode.is_free()) and self.is_short(length)

    def record_write(self, length: int, seconds: float) -> None:
        """Record how long a write of ``length`` bytes took, inline or in a thread."""
        self._unsynced_bytes += length
        if length > INLINE_WRITE_BYTES:
            self._long_writes.record(seconds, slept=False)
        if seconds <= _THROTTLED_SECONDS:
            if self._inode.is_throttled:
                self._inode.end_throttling()
        elif length <= INLINE_WRITE_BYTES:
            self._inode.record_slow_write(seconds)

    def begin_datasync(self) -> bool:
        """Return whether the event loop may make the datasync that begins now itself.

        It may if the last datasyncs were faster than a round trip to a thread, if there is
        little to write back, and if no request waits for the event loop meanwhile.
        """
        is_little = self._unsynced_bytes <= _MAX_INLINE_DATASYNC_BYTES
        self._unsynced_bytes = 0
        return (
            self._datasyncs.seconds > 0
            and is_little
            and self._inode.is_free()
            and not loop_load.has_requests()
        )

    def record_datasync(self, seconds: float, *, is_inline: bool) -> None:
        """Record how long a datasync took."""
        self._datasyncs.record(seconds, slept=not is_inline)
