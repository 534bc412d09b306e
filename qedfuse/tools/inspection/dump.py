"""The tables of an image entry by entry, for people who debug images, broken ones above all.

Neighbouring entries that are stored as one come out as a range.  A table is read slice by
slice and given out as it is read.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import Code
from qedfuse.errors import HeaderError, NotQedError, UsageError
from qedfuse.hostio.imagefile import open_image_file
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES, MAX_OFFSET, UNALLOCATED, ZERO
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules
from qedfuse.ondisk.formats import is_qed
from qedfuse.tools.inspection.rawheader import read_raw

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from numpy.typing import NDArray

    from qedfuse.hostio.posixfile import PosixFile
    from qedfuse.ondisk.entryrules import Values
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.inspection.rawheader import RawHeader

OK: Final = "ok"
ZEROS: Final = "zeros"
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
"""What is said of entries that cannot be right."""

_MAX_KNOWN_TABLES: Final = 1 << 16
"""L2 tables that are known when entries of another are judged; 64 TiB have 32768."""


@dataclass(frozen=True, slots=True)
class EntryRange:
    """Neighbouring entries of a table that follow each other in the file too, or are alike.

    Attributes:
        index: Of the first entry in its table.
        count: How many there are.
        value: Of the first one; each further one is `step` more.
        step: Bytes from one value to the next.
        guest_start: Where on the disk the range begins.
        guest_length: How many bytes of the disk it describes.
        verdict: ``ok``, ``zeros``, or what is wrong with it.
    """

    index: int
    count: int
    value: int
    step: int
    guest_start: int
    guest_length: int
    verdict: str


class Dump:
    """An image that is open to be looked at, whatever is wrong with it.

    Attributes:
        name: The image, fit to be printed.
        header: What its header says.
    """

    def __init__(self, file: PosixFile, header: RawHeader) -> None:
        """Look at a file that is open."""
        self._file = file
        self.name = file.name
        self.header = header

    def _header(self) -> Header:
        """Give a header by which tables can be found.

        Raises:
            HeaderError: Of this one nobody could tell where entries are.
        """
        header = self.header.header
        if header is None:
            raise self.header.problems[-1].again()
        if header.l1_end > MAX_OFFSET:
            found, expected = header.l1_table_offset, "a table that a file can hold"
            raise HeaderError(self.name, "l1_table_offset", found, expected)
        return header

    async def l1(self) -> AsyncGenerator[EntryRange, None]:
        """Give the entries of the L1 table that are in use.

        Raises:
            ImageError: The header does not even say where it is.
        """
        header = self._header()
        classifier = EntryClassifier(header, self._file.size())
        span, step = header.geometry.table_span, header.geometry.table_bytes
        async for first, values in read_table(self._file, header.l1_table_offset, step):
            verdicts = np.zeros(len(values), np.uint8)
            for code, mask in classifier.l1_errors(values):
                verdicts[mask] = _NUMBERS[code]
            for item in _ranges(values, verdicts, step, values != UNALLOCATED):
                yield _entry_range(item, first, 0, span)

    async def l2(self, l1_index: int) -> AsyncGenerator[EntryRange, None]:
        """Give the entries in use of the L2 table that an L1 entry names.

        Raises:
            UsageError: There is no such L1 entry, or it names no place of the file.
            ImageError: The header does not even say where the L1 table is.
        """
        header = self._header()
        geometry = header.geometry
        table = await self.table(l1_index)
        classifier = EntryClassifier(header, self._file.size(), await self._tables(header))
        guest = l1_index * geometry.table_span
        async for first, values in read_table(self._file, table, geometry.table_bytes):
            verdicts = np.zeros(len(values), np.uint8)
            for code, mask in classifier.l2_errors(values):
                verdicts[mask] = _NUMBERS[code]
            verdicts[values == ZERO] = _ZEROS
            for item in _ranges(values, verdicts, geometry.cluster_size, values != UNALLOCATED):
                yield _entry_range(item, first, guest, geometry.cluster_size)

    async def table(self, l1_index: int) -> int:
        """Give the file offset of the L2 table that an L1 entry names, right or wrong.

        Raises:
            UsageError: There is no such entry, or no place in the file where it points.
        """
        header = self._header()
        if not 0 <= l1_index < header.geometry.entries:
            msg = f"{self.name}: L1 entry: found {l1_index}, expected 0 to "
            msg += f"{header.geometry.entries - 1}"
            raise UsageError(msg)
        place = header.l1_table_offset + l1_index * ENTRY_BYTES
        table = int.from_bytes(await self._file.pread(place, ENTRY_BYTES), "little")
        if table == UNALLOCATED or table >= self._file.size():
            found = "0 (no table)" if table == UNALLOCATED else str(table)
            msg = (
                f"{self.name}: L1 entry {l1_index}: found {found}, expected an offset inside the "
                f"file of {self._file.size()} bytes"
            )
            raise UsageError(msg)
        return table

    async def _tables(self, header: Header) -> Values:
        """Collect the file offsets of the L2 tables that L1 entries name, ascending.

        Invalid L1 entries name none; of more than `_MAX_KNOWN_TABLES` some are left out.
        """
        rules = EntryRules(EntryLimits.for_l1(header, self._file.size()))
        found = [NO_TABLES]
        l1_table, length = header.l1_table_offset, header.geometry.table_bytes
        async for _first, values in read_table(self._file, l1_table, length):
            found.append(values[rules.valid_mask(values)])
            if sum(map(len, found)) > _MAX_KNOWN_TABLES:
                break
        return np.sort(np.concatenate(found))


_NAMES: Final = (OK, ZEROS, *dict.fromkeys(VERDICTS.values()))
_ZEROS: Final = _NAMES.index(ZEROS)
_NUMBERS: Final = {code: _NAMES.index(word) for code, word in VERDICTS.items()}


def _ranges(
    values: Values, verdicts: NDArray[np.uint8], step: int, used: NDArray[np.bool_]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut entries into ranges: index, count, value, step, verdict."""
    alike = (verdicts[1:] == verdicts[:-1]) & used[1:] & used[:-1]
    rising = alike & (values[1:] - values[:-1] == step)
    equal = alike & (values[1:] == values[:-1])
    # A range goes on by one rule only: three entries that rise, or three that are equal.
    first = 0
    count = len(values)
    breaks_rising = np.append(np.flatnonzero(~rising) + 1, count)
    breaks_equal = np.append(np.flatnonzero(~equal) + 1, count)
    places = np.flatnonzero(used)
    while first < count:
        where = int(np.searchsorted(places, first))
        if where == len(places):
            return
        first = int(places[where])
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
    index, count, value, step, verdict = item
    index += first
    if count == 1:
        step = 0
    return EntryRange(
        index, count, value, step, guest + index * span, count * span, _NAMES[verdict]
    )


@asynccontextmanager
async def open_dump(path: str, *, share: bool = False) -> AsyncIterator[Dump]:
    """Open an image to look at what is in it.

    Raises:
        NotQedError: It has no QED magic.
        QedError: It cannot be opened, or is in use.
    """
    with open_image_file(path, LockMode.to_read(share=share)) as file:
        start = bytes(await file.pread(0, HEADER_BYTES))
        if not is_qed(start):
            msg = f"{file.name}: not a QED image: found no QED magic at the file's beginning"
            raise NotQedError(msg)
        await trio.lowlevel.checkpoint()
        yield Dump(file, read_raw(start, file.size(), file.name))
