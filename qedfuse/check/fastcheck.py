"""The fast check: it confirms that an image is sound, or leaves it to the check.

The check needs numpy and trio, which take longer to load than the tables of a full image of
1 TiB take to be read.  So a small C extension (`_sweep.c`) reads the tables first.  It
answers "sound" or "unknown"; an image of the latter kind goes to the check.  The extension
is optional: where it is missing the check does everything, with the same results.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from qedfuse.check.findings import CheckReport, FindingCollector
from qedfuse.check.headernotes import header_notes
from qedfuse.errors import QedError
from qedfuse.hostio.lockedfile import locked_descriptor, read_header_of
from qedfuse.hostio.locking import LockMode
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.ondisk.header import Header

    Sweep = Callable[[int, int, int, int, int, int, int], tuple[int, int, int] | None]


def _load() -> Sweep | None:
    """Return the function of the extension; None if it was not built."""
    try:
        return importlib.import_module("qedfuse.check._sweep").sweep  # type: ignore[no-any-return]
    except ImportError:
        return None


_sweep = _load()


def fast_check(path: str, *, share: bool = False) -> tuple[Header, int, CheckReport] | None:
    """Check an image; return None if it must be left to the check.

    Args:
        path: The image.
        share: Read beside a program that writes to it.  Without, None for such an image.

    Returns:
        The header, the file's length in bytes, and the report of a sound image.
    """
    # The extension reads little-endian tables without conversion.
    if _sweep is None or sys.byteorder != "little":
        return None
    try:
        with locked_descriptor(path, LockMode.to_read(share=share)) as fd:
            return _check_open(fd, printable(path), _sweep)
    except (OSError, QedError):
        return None


def _check_open(fd: int, name: str, sweep: Sweep) -> tuple[Header, int, CheckReport] | None:
    """Check an open image; return None if it must be left to the check."""
    header, size = read_header_of(fd, name)
    geometry = header.geometry
    if header.free_list or geometry.in_cluster(size):
        return None
    limits = EntryLimits.for_l2(header, size)
    found = sweep(
        fd,
        geometry.cluster_bits,
        limits.header_end,
        limits.l1_start,
        limits.table_bytes,
        limits.file_size,
        geometry.clusters(header.image_size),
    )
    clusters = size >> geometry.cluster_bits
    if found is None or found[0] != clusters:
        return None
    notes = FindingCollector()
    for note in header_notes(header, size, name):
        notes.add(note)
    report = CheckReport(
        tuple(notes.findings), dict(notes.counts), found[1], clusters, fragmented_clusters=found[2]
    )
    return header, size, report
