"""Which reads the event loop tries itself, and which go to a thread without a try.

In an *inline* read the event loop reads only what is in the host's page cache (``RWF_NOWAIT``).  A
miss takes the event loop longer than a read that finds everything, and gains nothing.  So after
some misses in a row, each read goes directly to a thread, or to a queue of the kernel
(``_queuedread.c``).  When some such reads in a row have found their data in the page cache after
all, the event loop tries reads again.
"""

from __future__ import annotations

from typing import Final

_MISSES_IN_A_ROW: Final = 4
"""Number of misses in a row after which reads are not tried inline."""
_HITS_IN_A_ROW: Final = 4
"""Number of reads in a row from the page cache after which reads are tried inline again."""
_CACHED_SECONDS: Final = 15e-6
"""Maximum time of a short read that counts as cached; a fast disk takes several times as long."""
_CACHED_SECONDS_PER_BYTE: Final = 0.25e-9
"""Added to `_CACHED_SECONDS` for each byte of a read: 4 GB/s, the rate of a slow copy in memory."""


class ReadPolicy:
    """Decides for one file whether its next read is tried inline.

    Attributes:
        is_inline: Whether the event loop should try to read from the page cache.
        misses: How many inline reads in a row have not found all their data.  The caller must set
            this to 0 after a success; a method would cost more than all other bookkeeping of such a
            read.
        uncached: How many reads have found that the page cache lacked some of their data.
        can_queue: Whether a queue of the kernel (``_ring.c``) can make reads of the file.  False if
            the file system asks a server, or does not support RWF_NOWAIT: the kernel itself would
            need a thread for each of these reads.
    """

    def __init__(self, *, can_queue: bool = False) -> None:
        """Start with reads that are tried inline; ``can_queue`` sets the attribute."""
        self.can_queue = can_queue
        self.is_inline = True
        self.misses = 0
        self.uncached = 0
        self._hits = 0
        self._is_supported = True

    def record_inline_miss(self) -> None:
        """Record that an inline read has not found all its data."""
        self.misses += 1
        self.uncached += 1
        if self.misses >= _MISSES_IN_A_ROW:
            self.is_inline = False
            self._hits = 0

    def record_direct_read(self, length: int, seconds: float) -> None:
        """Record the time of a read of ``length`` bytes that went to a thread without a try."""
        self.record_cached(seconds <= _CACHED_SECONDS + length * _CACHED_SECONDS_PER_BYTE)

    def record_cached(self, is_cached: bool) -> None:  # noqa: FBT001  the extension calls it
        """Record whether a read that was not tried inline has found its data in the page cache."""
        if not is_cached:
            self.uncached += 1
            self._hits = 0
            return
        self._hits += 1
        if self._hits >= _HITS_IN_A_ROW and self._is_supported:
            self.is_inline = True
            self.misses = 0

    def disable_inline(self) -> None:
        """Forbid inline reads and queued reads from now on: the file system supports neither."""
        self.is_inline = self._is_supported = self.can_queue = False
