"""The host's page cache: bring files into it, write them back, and evict them.

The cost of a write depends on the state of the page that it changes.  A page is clean after
a copy and a sync, dirty after a write, and under write-back while the kernel writes it to
the host's disk.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_CHUNK_BYTES: Final = 16 << 20
_WRITE_BACK_PAUSE_SECONDS: Final = 0.001
_SYNC_FILE_RANGE_WRITE: Final = 2
"""Start the write-back of dirty pages without waiting for it; see sync_file_range(2)."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def cache_file(path: Path) -> None:
    """Bring a file into the host's page cache, in single pages.

    After a plain read the kernel may keep it in large folios of up to 2 MiB, and a write of
    4 KiB into such a folio takes ten times as long, which would dominate the measurement.
    """
    with path.open("rb", buffering=0) as file:
        # WILLNEED reads single pages; the read afterwards waits for them.
        for start in range(0, path.stat().st_size, _CHUNK_BYTES):
            os.posix_fadvise(file.fileno(), start, _CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
            while file.tell() < start + _CHUNK_BYTES and file.read(_CHUNK_BYTES):
                pass


def sync_file(path: Path) -> None:
    """Write a file back to the host's disk, so that no later measurement waits for it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def evict_file(path: Path) -> None:
    """Evict a file from the host's page cache."""
    sync_file(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def drop_page_cache() -> None:
    """Evict all clean pages of all files from the host's page cache; only root may do this."""
    Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")


def start_write_back(descriptor: int) -> None:
    """Start the write-back of all dirty pages of a file.

    The call waits only for space in the queue of the host's disk, not until all is written.

    Raises:
        OSError: The kernel refused.
    """
    start, length = ctypes.c_int64(0), ctypes.c_int64(0)  # 0 stands for the end of the file
    if _LIBC.sync_file_range(descriptor, start, length, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)):
        code = ctypes.get_errno()
        raise OSError(code, f"sync_file_range: {os.strerror(code)}")


class ContinuousWriteBack:
    """Keeps the dirty pages of files under write-back, as a context manager.

    The write-back of pages that become dirty starts within a few milliseconds, in a thread:
    for many pages, starting it takes nearly as long as the write-back itself.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._descriptors = [os.open(path, os.O_RDONLY) for path in paths]
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        """Begin to start the write-back of dirty pages."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop starting the write-back of further pages."""
        self._stop.set()
        self._thread.join()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _run(self) -> None:
        while not self._stop.wait(_WRITE_BACK_PAUSE_SECONDS):
            for descriptor in self._descriptors:
                start_write_back(descriptor)
