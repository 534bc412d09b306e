"""The header and the table entries of an image, for debugging, above all of broken images.

Each entry gets a verdict: it is a valid offset, it is a zero cluster, or it breaks a rule.
Adjacent entries with the same verdict form a range if all their values are equal, or if each value
is one cluster (in the L1 table: one L2 table) higher than the previous one.  A range does not cross
the end of a slice of 64 KiB, because a table is read slice by slice.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import Code
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.errors import HeaderError, NotQedError, UsageError
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES, MAX_OFFSET, UNALLOCATED, ZERO
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules
from qedfuse.ondisk.formats import is_qed
from qedfuse.remote.options import RemoteOptions
from qedfuse.tools.inspection.rawheader import read_raw

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Values
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.inspection.rawheader import RawHeader

OK: Final = "ok"
"""The verdict on an entry that is a valid offset."""
ZEROS: Final = "zeros"
"""The verdict on the entry of a zero cluster."""
VERDICTS: Final = {
    Code.L1_RESERVED_BITS: "reserved",
    Code.L1_UNALIGNED: "unaligned",
    Code.L1_OUT_OF_FILE: "past the end",
    Code.L1_CUT_SHORT: "cut short",
    Code.L1_OVER_METADATA: "over metadata",
    Code.L2_RESERVED_BITS: "reserved",
    Code.L2_UNALIGNED: "unaligned",
    Code.L2_OUT_OF_FILE: "past the end",
    Code.L2_CUT_SHORT: "cut short",
    Code.L2_OVER_METADATA: "over metadata",
}
"""The verdict on an invalid entry, by the code of its error."""

_MAX_COMPARED_TABLES: Final = 1 << 16
"""Number of L2 tables after which `Dump._tables` stops; L2 entries are compared with these tables.

A disk of 64 TiB has 32768 tables by default.  An L2 entry that points into a table that was not
compared may have the verdict ``ok``.
"""


@dataclass(frozen=True, slots=True)
class EntryRange:
    """Adjacent entries of a table whose values are contiguous offsets, or are all equal.

    Attributes:
        index: Index in the table of the range's first entry.
        count: Number of entries.
        value: Value of the first entry.
        step: Difference in bytes between adjacent values; 0 if all values are equal.
        guest_start: Guest offset in bytes of the part of the disk that the first entry describes.
        guest_length: Bytes of the disk that the entries describe, perhaps past its end.
        verdict: ``ok``, ``zeros``, or one of the values of `VERDICTS`.
    """

    index: int
    count: int
    value: int
    step: int
    guest_start: int
    guest_length: int
    verdict: str


class Dump:
    """An open image whose header and tables can be listed, even if they are invalid.

    Attributes:
        name: Name of the image in messages, as printable text.
        header: The fields of the header, valid or not.
    """

    def __init__(self, file: HostFile, header: RawHeader) -> None:
        """Make a reader of an open file, which the caller must close later."""
        self._file = file
        self.name = file.name
        self.header = header

    def _parsed_header(self) -> Header:
        """Return the header if its geometry is valid and the L1 table ends before `MAX_OFFSET`.

        Raises:
            ImageError: The header is too damaged to find the L1 table.
        """
        header = self.header.header
        if header is None:
            # The search for problems ends with the one that makes the header unusable.
            raise self.header.problems[-1].again()
        if header.l1_end > MAX_OFFSET:
            found, expected = header.l1_table_offset, f"a table whose end is at most {MAX_OFFSET}"
            raise HeaderError(self.name, "l1_table_offset", found, expected)
        return header

    async def l1(self) -> AsyncGenerator[EntryRange, None]:
        """Yield the ranges of those entries of the L1 table that are not 0.

        If the file ends within the table, the entries past that end are left out.

        Raises:
            ImageError: The header is too damaged to find the table.
            HostError: The host cannot read the file.
        """
        header = self._parsed_header()
        classifier = EntryClassifier(header, self._file.size())
        span, step = header.geometry.table_span, header.geometry.table_bytes
        async for first, values in read_table(self._file, header.l1_table_offset, step):
            verdicts = np.zeros(len(values), np.uint8)
            for code, mask in classifier.l1_errors(values):
                verdicts[mask] = _VERDICT_NUMBERS[code]
            for item in _ranges(values, verdicts, step, values != UNALLOCATED):
                yield _entry_range(item, first, 0, span)

    async def l2(self, l1_index: int) -> AsyncGenerator[EntryRange, None]:
        """Yield the ranges of the entries that are not 0 in the L2 table of an L1 entry.

        If the file ends within the table, the entries past that end are left out.

        Raises:
            UsageError: The L1 table has no entry ``l1_index``, the file ends before or within the
                entry, or the value of the entry is 0, or at or past the end of the file.
            ImageError: The header is too damaged to find the L1 table.
            HostError: The host cannot read the file.
        """
        header = self._parsed_header()
        geometry = header.geometry
        table_offset = await self.table_offset(l1_index)
        classifier = EntryClassifier(header, self._file.size(), await self._tables(header))
        guest = l1_index * geometry.table_span
        async for first, values in read_table(self._file, table_offset, geometry.table_bytes):
            verdicts = np.zeros(len(values), np.uint8)
            for code, mask in classifier.l2_errors(values):
                verdicts[mask] = _VERDICT_NUMBERS[code]
            verdicts[values == ZERO] = _ZEROS_NUMBER
            for item in _ranges(values, verdicts, geometry.cluster_size, values != UNALLOCATED):
                yield _entry_range(item, first, guest, geometry.cluster_size)

    async def table_offset(self, l1_index: int) -> int:
        """Return the value of an L1 entry: the file offset of its L2 table.

        The offset lies inside the file, but may break other rules, such as the alignment.

        Raises:
            UsageError: The L1 table has no entry ``l1_index``, the file ends before or within the
                entry, or the value of the entry is 0, or at or past the end of the file.
            ImageError: The header is too damaged to find the L1 table.
            HostError: The host cannot read the file.
        """
        header = self._parsed_header()
        if not 0 <= l1_index < header.geometry.entries:
            msg = f"{self.name}: L1 entry: found {l1_index}, expected 0 to "
            msg += f"{header.geometry.entries - 1}"
            raise UsageError(msg)
        position = header.l1_table_offset + l1_index * ENTRY_BYTES
        end, file_bytes = position + ENTRY_BYTES, self._file.size()
        if end > file_bytes:
            msg = f"{self.name}: L1 entry {l1_index}: found the end of the file at "
            msg += f"{file_bytes}, expected the entry up to {end}"
            raise UsageError(msg)
        table_offset = int.from_bytes(await self._file.pread(position, ENTRY_BYTES), "little")
        if table_offset == UNALLOCATED or table_offset >= file_bytes:
            found = "0 (no table)" if table_offset == UNALLOCATED else str(table_offset)
            msg = (
                f"{self.name}: L1 entry {l1_index}: found {found}, expected an offset inside the "
                f"file of {file_bytes} bytes"
            )
            raise UsageError(msg)
        return table_offset

    async def _tables(self, header: Header) -> Values:
        """Return the file offsets of the L2 tables of valid L1 entries, ascending.

        Of more than `_MAX_COMPARED_TABLES` tables, some may be left out.
        """
        rules = EntryRules(EntryLimits.for_l1(header, self._file.size()))
        found = [NO_TABLES]
        l1_table, length = header.l1_table_offset, header.geometry.table_bytes
        async for _first, values in read_table(self._file, l1_table, length):
            found.append(values[rules.valid_mask(values)])
            if sum(map(len, found)) > _MAX_COMPARED_TABLES:
                break
        return np.sort(np.concatenate(found))


_VERDICT_NAMES: Final = (OK, ZEROS, *dict.fromkeys(VERDICTS.values()))
_ZEROS_NUMBER: Final = _VERDICT_NAMES.index(ZEROS)
_VERDICT_NUMBERS: Final = {code: _VERDICT_NAMES.index(word) for code, word in VERDICTS.items()}


def _ranges(
    values: Values, verdicts: NDArray[np.uint8], step: int, used: NDArray[np.bool_]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the longest ranges of entries that can be combined, in ascending order.

    ``step`` is the difference between contiguous offsets; ``used`` is the mask of the entries to
    yield.  A range is: index in the slice, number of entries, first value, ``step`` or 0 for equal
    values, index in `_VERDICT_NAMES`.
    """
    same_verdict = (verdicts[1:] == verdicts[:-1]) & used[1:] & used[:-1]
    rising = same_verdict & (values[1:] - values[:-1] == step)
    equal = same_verdict & (values[1:] == values[:-1])
    # From each first entry two ranges are possible: of rising and of equal values.  The longer
    # one is yielded.
    first = 0
    count = len(values)
    breaks_rising = np.append(np.flatnonzero(~rising) + 1, count)
    breaks_equal = np.append(np.flatnonzero(~equal) + 1, count)
    used_indices = np.flatnonzero(used)
    while first < count:
        following = int(np.searchsorted(used_indices, first))
        if following == len(used_indices):
            return
        first = int(used_indices[following])
        by_rising = int(breaks_rising[np.searchsorted(breaks_rising, first, "right")])
        by_equal = int(breaks_equal[np.searchsorted(breaks_equal, first, "right")])
        end = max(by_rising, by_equal)
        yield (
            first,
            end - first,
            int(values[first]),
            step if by_rising >= by_equal else 0,
            int(verdicts[first]),
        )
        first = end


def _entry_range(
    item: tuple[int, int, int, int, int], first: int, guest: int, span: int
) -> EntryRange:
    """Convert a range that `_ranges` has yielded for a slice.

    ``first`` is the index of the slice's first entry, ``guest`` the guest offset of the table, and
    ``span`` the bytes of the disk per entry.
    """
    index, count, value, step, verdict = item
    index += first
    if count == 1:
        step = 0
    return EntryRange(
        index, count, value, step, guest + index * span, count * span, _VERDICT_NAMES[verdict]
    )


@asynccontextmanager
async def open_dump(
    path: str, *, share: bool = False, remote: RemoteOptions | None = None
) -> AsyncIterator[Dump]:
    """Open an image to list its header and tables; close it at the end of the ``async with`` block.

    Args:
        path: The image, or its URL.
        share: Allow that another program writes to the image.
        remote: How to read a URL; None for the defaults.

    Raises:
        NotQedError: The file has no QED magic.
        QedError: The image cannot be opened, locked or read.
    """
    lock = LockMode.to_read(share=share)
    async with open_image(path, lock, remote or RemoteOptions()) as file:
        raw_header = bytes(await file.pread(0, HEADER_BYTES))
        if not is_qed(raw_header):
            msg = f"{file.name}: not a QED image: found no QED magic at the file's beginning"
            raise NotQedError(msg)
        await trio.lowlevel.checkpoint()
        yield Dump(file, read_raw(raw_header, file.size(), file.name))
