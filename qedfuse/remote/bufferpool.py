"""Buffers for parts of an object; a buffer is used again when no view of it is left.

To allocate a buffer of 1 MiB takes longer than to receive 1 MiB: the kernel clears the pages, and
then Python, holding the GIL, clears them again.
"""

from __future__ import annotations

import threading
from typing import Final

BUFFER_BYTES: Final = 1 << 20
_MAX_BUFFERS: Final = 8


class BufferPool:
    """Keeps at most 8 MiB of buffers.  Threads may use the object concurrently."""

    def __init__(self) -> None:
        """Begin without buffers."""
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []  # also those that are in use

    def take(self, length: int) -> memoryview:
        """Return a view of ``length`` bytes, whose content is undefined.

        The buffer is used again when this view and every view made from it are gone.  If ``length``
        exceeds `BUFFER_BYTES`, or all buffers are in use, the pool does not keep the buffer.
        """
        with self._lock:
            # Always the first free buffer: it is used most often, so the processor caches it.
            buffer = next(filter(_is_free, self._buffers), None)
            if buffer is None and len(self._buffers) < _MAX_BUFFERS and length <= BUFFER_BYTES:
                buffer = bytearray(BUFFER_BYTES)
                self._buffers.append(buffer)
            if buffer is not None and length <= BUFFER_BYTES:
                return memoryview(buffer)[:length]
        return memoryview(bytearray(length))

    def clear(self) -> None:
        """Forget all buffers; Python frees each when nothing refers to it."""
        with self._lock:
            self._buffers.clear()


def _is_free(buffer: bytearray) -> bool:
    """Return whether no view of a buffer is left."""
    try:
        buffer.append(0)  # Python refuses to change the length while there is a view
    except BufferError:
        return False
    buffer.pop()
    return True
