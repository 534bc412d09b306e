"""The fast check: confirms that an image has no errors and no leaks, or gives up.

Loading numpy and trio for the full check (`qedfuse.check.checker`) takes longer than reading the
tables of a full image of 1 TiB.  So a small C extension (`_sweep.c`) reads the tables first.
Without the extension the caller runs the full check on every image, with the same results.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Final

from qedfuse.check.findings import CheckReport, FindingCollector
from qedfuse.check.headernotes import header_notes
from qedfuse.errors import QedError
from qedfuse.hostio.lockedfile import locked_descriptor, read_header_of
from qedfuse.hostio.locking import LockMode
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.text import printable
from qedfuse.util.extensions import try_import_extension

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.ondisk.header import Header

    Sweep = Callable[[int, int, int, int, int, int, int], tuple[int, int, int] | None]


_INTERFACE: Final = 1
"""The interface number of the extension."""


@cache
def _load() -> Sweep | None:
    """Return the function ``sweep`` of the extension; None if the extension cannot be used."""
    extension = try_import_extension("qedfuse.check._sweep", _INTERFACE)
    return None if extension is None else extension.sweep


def fast_check(path: str, *, share: bool = False) -> tuple[Header, int, CheckReport] | None:
    """Check an image; return None if the caller must run the full check.

    Args:
        path: The image.
        share: Whether to check an image that another program has open for writing.

    Returns:
        The header, the file's length in bytes, and a report without errors or leaks.  None in any
        other case, for example if the image has a free list or cannot be read.
    """
    # The extension reads entries in the byte order of the host.  The entries of an image are
    # little-endian, so the extension is used on little-endian hosts only.
    sweep = _load() if sys.byteorder == "little" else None
    if sweep is None:
        return None
    try:
        with locked_descriptor(path, LockMode.to_read(share=share)) as fd:
            return _check_open(fd, printable(path), sweep)
    except (OSError, QedError):
        return None


def _check_open(fd: int, name: str, sweep: Sweep) -> tuple[Header, int, CheckReport] | None:
    """Check an open image, called ``name`` in messages; the result is that of `fast_check`."""
    header, size = read_header_of(fd, name)
    geometry = header.geometry
    if header.has_free_list or geometry.in_cluster(size):
        return None
    limits = EntryLimits.for_l2(header, size)
    swept = sweep(
        fd,
        geometry.cluster_bits,
        limits.header_end,
        limits.l1_start,
        limits.table_bytes,
        limits.file_size,
        geometry.clusters(header.image_size),
    )
    clusters = size >> geometry.cluster_bits
    if swept is None:
        return None
    owned, allocated, fragmented = swept
    if owned != clusters:  # the other clusters are leaked
        return None
    notes = FindingCollector()
    for note in header_notes(header, size, name):
        notes.add(note)
    report = CheckReport(
        tuple(notes.findings),
        dict(notes.counts),
        allocated,
        clusters,
        fragmented_clusters=fragmented,
    )
    return header, size, report
