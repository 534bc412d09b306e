"""Which writes and datasyncs the event loop makes itself, and which a worker thread makes.

A round trip to a worker thread takes longer than a copy of a few hundred KiB into the page cache,
and longer than a datasync on a fast disk.  But a call that blocks the event loop stops all
requests.  So the event loop makes a call itself only if it is expected to be fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from qedfuse.hostio.inodelock import InodeLock
    from qedfuse.util.loopload import LoopLoad

ALWAYS_SHORT_WRITE_BYTES: Final = 1 << 18
"""Maximum length of a write that always counts as short, because its copy to the page cache takes
less time than a round trip to a worker thread."""
MAX_SHORT_WRITE_BYTES: Final = 1 << 20
"""Maximum length of a write that can count as short.  A write longer than
`ALWAYS_SHORT_WRITE_BYTES` is short only while such writes have lately been fast.  They are slow
while memory is full of dirty pages, because the kernel then makes writers wait."""
_FAST_WRITE_SECONDS: Final = 4e-3
"""Maximum time of a fast write of more than `ALWAYS_SHORT_WRITE_BYTES`, several times that of the
copy to the page cache."""
_FAST_DATASYNC_SECONDS: Final = 1e-3
"""Maximum time of a fast datasync; twice this time in a thread, because of the round trip."""
_THROTTLED_SECONDS: Final = 8e-3
"""A write of at most `ALWAYS_SHORT_WRITE_BYTES` counts as slow if it takes longer.  The kernel may
have throttled it: the shortest pause of a throttled writer is 10 ms."""
_MAX_INLINE_DATASYNC_BYTES: Final = 1 << 21
"""If more was written since the last datasync began, a thread makes the next one."""


class InlinePolicy:
    """Decides which calls on one file are inline: made by the event loop itself."""

    def __init__(self, inode_lock: InodeLock) -> None:
        """Decide for one file; ``inode_lock`` observes the lock of its inode."""
        self._inode_lock = inode_lock
        self._long_writes = AdaptivePoll(_FAST_WRITE_SECONDS, start_enabled=True)
        self._datasyncs = AdaptivePoll(_FAST_DATASYNC_SECONDS)
        self._unsynced_bytes = 0  # written since the last datasync began
        self._load: LoopLoad | None = None  # looked up once, because that takes time

    def is_short(self, length: int) -> bool:
        """Return whether a write of ``length`` bytes counts as short."""
        return length <= ALWAYS_SHORT_WRITE_BYTES or (
            length <= MAX_SHORT_WRITE_BYTES and self._long_writes.seconds > 0
        )

    def can_write_inline(self, length: int) -> bool:
        """Return whether the event loop can write ``length`` bytes itself now.

        The write must be short, and must not have to wait for the inode's lock.
        """
        return (
            not self._inode_lock.contention or self._inode_lock.recheck_free()
        ) and self.is_short(length)

    def record_write(self, length: int, seconds: float) -> None:
        """Record how long a write of ``length`` bytes took, inline or in a thread.

        After a slow write of at most `ALWAYS_SHORT_WRITE_BYTES`, `InodeLock` may begin to assume
        throttling.  A write that takes at most `_THROTTLED_SECONDS` ends this assumption.
        """
        self._unsynced_bytes += length
        if length > ALWAYS_SHORT_WRITE_BYTES:
            # ``seconds`` is the time of the system call without the round trip to a thread.
            self._long_writes.record(seconds, slept=False)
        if seconds <= _THROTTLED_SECONDS:
            if self._inode_lock.is_throttled:
                self._inode_lock.end_throttling()
        elif length <= ALWAYS_SHORT_WRITE_BYTES:
            self._inode_lock.record_slow_write(seconds)

    def begin_datasync(self) -> None:
        """Record the beginning of a datasync; it covers all writes that were recorded before."""
        self._unsynced_bytes = 0

    def can_datasync_inline(self) -> bool:
        """Return whether the event loop can make a datasync itself now.

        The last datasyncs must have been fast, few bytes must have been written since, the inode's
        lock must be free, and no request may wait for the event loop.
        """
        return (
            self._datasyncs.seconds > 0
            and self._unsynced_bytes <= _MAX_INLINE_DATASYNC_BYTES
            and self._inode_lock.recheck_free()
            and not self._loop_load().has_requests()
        )

    def _loop_load(self) -> LoopLoad:
        """Return the load of the event loop."""
        if self._load is None:
            self._load = loop_load()
        return self._load

    def record_datasync(self, seconds: float, *, is_inline: bool) -> None:
        """Record how long a datasync took; for a thread, ``seconds`` includes the round trip."""
        self._datasyncs.record(seconds, slept=not is_inline)
