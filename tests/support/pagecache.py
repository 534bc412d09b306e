"""Files whose next read comes from the disk."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.residency import Residency

if TYPE_CHECKING:
    from pathlib import Path

_WAIT_SECONDS: Final = 60.0
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def drop_pages(path: Path) -> None:
    """Write a file, which is not empty, to its disk, and drop it from the page cache.

    One call is not enough: the kernel keeps a page that another processor or a daemon, which looks
    for memory to reclaim, refers to for a moment.
    """
    end = time.monotonic() + _WAIT_SECONDS
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with closing(Residency(file.fileno(), size)) as residency:
            while True:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if not any(residency.has_range(at, 1) for at in range(0, size, _PAGE_BYTES)):
                    return
                assert time.monotonic() < end, f"{path}: the page cache keeps pages"
                time.sleep(0.01)
