"""The numbers of entries in an image's L1 table, counted without numpy and trio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.constants import ENTRY_BYTES, MAX_OFFSET, UNALLOCATED
from qedfuse.ondisk.entrylimits import EntryLimits, overlaps
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.inspection.imagereader import ImageReader

MAX_L1_BYTES: Final = 8 << 20
"""Maximum length in bytes of the slices of an L1 table that are read and hold an entry.  Holes and
slices of zeros do not count."""


@dataclass(frozen=True, slots=True)
class L1Summary:
    """The numbers of entries in the part of an L1 table that was read.

    Attributes:
        used: Number of entries that are not 0.
        invalid: Number of used entries that are not a valid offset of an L2 table.
        overlapping: Number of L2 tables that overlap an earlier one in the file, by the rule of
            `qedfuse.ondisk.entrylimits.overlaps`.
        complete: Whether the L1 table was read up to its end, or to the end of the file.
        failure: Why the host could not read a part of the L1 table; empty if no read failed.
    """

    used: int = 0
    invalid: int = 0
    overlapping: int = 0
    complete: bool = False
    failure: str = ""


def summarize_l1(image: ImageReader, header: Header) -> L1Summary:
    """Read the L1 table of an open image, at most `MAX_L1_BYTES`, and count its entries.

    If the host cannot read a part of the table, only the entries before that part are counted.

    Args:
        image: The image.
        header: The header, whose geometry must be valid.

    Raises:
        RemoteError: The image is a URL, and the server does not give the table.
    """
    if header.l1_table_offset > MAX_OFFSET:
        return L1Summary()
    limits = EntryLimits.for_l1(header, image.size)
    used = 0
    tables: list[int] = []
    start, left, complete, failure = header.l1_table_offset, MAX_L1_BYTES, True, ""
    end = min(header.l1_end, image.size)
    try:
        for offset in image.data_slices(start, end - start):
            raw = image.read(offset, min(SLICE_BYTES, end - offset)) if left > 0 else b""
            if not raw:
                complete = False
                break
            if raw.count(0) == len(raw):
                continue
            left -= SLICE_BYTES
            entries = decode(raw[: len(raw) & -ENTRY_BYTES])
            values = [value for value in entries if value != UNALLOCATED]
            used += len(values)
            tables += [value for value in values if limits.is_valid(value)]
    except OSError as error:
        complete, failure = False, error.strerror or str(error)
    overlapping = sum(overlaps(sorted(tables), limits.table_bytes))
    return L1Summary(used, used - len(tables), overlapping, complete, failure)
