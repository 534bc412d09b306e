"""Which reads the event loop tries itself, and which go to a thread without a try.

The event loop can read what is in the host's page cache (``RWF_NOWAIT``).  A read that misses
the cache makes the kernel start to fetch the data before it fails, and so takes the event loop
longer than a read that finds everything, to no avail.  Therefore, after some misses in a row,
reads go to a thread directly.  How long they take there shows when the data is cached again.

A sequential reader mostly finds what the kernel has read ahead, so its reads stay inline.
"""

from __future__ import annotations

from typing import Final

_MISSES_IN_A_ROW: Final = 4
"""Number of misses in a row after which reads are not tried inline."""
_HITS_IN_A_ROW: Final = 4
"""Number of reads in a row that a thread must find cached for reads to be tried inline again."""
_CACHED_SECONDS: Final = 15e-6
"""Maximum time of a short read that counts as cached.  Fast disks need several times as long."""
_CACHED_SECONDS_PER_BYTE: Final = 0.25e-9
"""How much longer a cached read may take for each byte: a copy at 4 GB/s, which is slow."""


class ReadPolicy:
    """Decides for one file whether its next read is tried inline.

    Attributes:
        is_inline: Whether the event loop should try to read from the page cache.
        misses: How many inline reads in a row have not found all their data.  The caller sets
            it to 0 after a read that has; a method for that would cost more than the rest.
    """

    def __init__(self) -> None:
        """Start with reads that are tried inline."""
        self.is_inline = True
        self.misses = 0
        self._hits = 0
        self._is_supported = True

    def record_inline_miss(self) -> None:
        """Record that an inline read has not found all its data, and goes to a thread."""
        self.misses += 1
        if self.misses >= _MISSES_IN_A_ROW:
            self.is_inline = False
            self._hits = 0

    def record_direct_read(self, length: int, seconds: float) -> None:
        """Record how long a thread took for a read of ``length`` bytes that was not tried."""
        if seconds > _CACHED_SECONDS + length * _CACHED_SECONDS_PER_BYTE:
            self._hits = 0
            return
        self._hits += 1
        if self._hits >= _HITS_IN_A_ROW and self._is_supported:
            self.is_inline = True
            self.misses = 0

    def disable_inline(self) -> None:
        """Let no read be tried inline any more: the file system does not support it."""
        self.is_inline = self._is_supported = False
