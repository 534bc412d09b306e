"""The map of an image without a backing file, written while its tables are read.

To load numpy and trio for `qedfuse.tools.inspection.mapping` takes longer than to read the tables
of a full image of 1 TiB.  So a small C extension (`_maplines.c`) formats the lines.  It stops at a
slice that is unreadable or may hold an invalid entry, and the caller continues with `mapping` after
the last extent that was written.  The extension is optional; `mapping` gives the same output.
"""

from __future__ import annotations

import os
import sys
from array import array
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Final

from qedfuse.errors import QedError
from qedfuse.hostio.lockedfile import locked_descriptor, read_header_of
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.sparse import seek
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.table import SLICE_BYTES, decode
from qedfuse.text import printable
from qedfuse.util.extensions import try_import_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.ondisk.header import Header

    Lines = Callable[[bytes, int, int, int, array[int], int, array[int], bool, bytes], bytes | None]

_MAX_L1_BYTES: Final = 1 << 22
"""Maximum length in bytes of the used part of an L1 table, which is read into memory."""

_MAX_NAME_CHARS: Final = 4096
"""Maximum length of an image's printable name, which is in each line of the text table."""


_INTERFACE: Final = 1
"""The interface number of the extension."""


@cache
def _load() -> Lines | None:
    """Return the function ``lines`` of the extension; None if the extension cannot be used."""
    extension = try_import_extension("qedfuse.tools.inspection._maplines", _INTERFACE)
    return None if extension is None else extension.lines


class FastMap:
    """The map of an image without a base; its header and the L1 entries in use must be valid.

    Attributes:
        size: Bytes of the disk.
        reached: Guest offset in bytes up to which the caller has written the extents, assuming
            that it writes each text before it asks for the next one.
    """

    def __init__(self, fd: int, header: Header, tables: array[int], lines: Lines) -> None:
        """Prepare the map of an open image.

        Args:
            fd: Descriptor of the image.
            header: The header of the image.
            tables: The valid L1 entries that the disk uses; 0 for a missing table.
            lines: Function ``lines`` of the extension.
        """
        self._fd = fd
        self._header = header
        self._tables = tables
        self._sorted = array("Q", sorted(set(tables) - {UNALLOCATED}))
        self._lines = lines
        self._limits = EntryLimits.for_l2(header, os.fstat(fd).st_size)
        self.size = header.image_size
        self.reached = 0

    def lines(self, *, as_json: bool, name: str) -> Iterator[str]:
        """Yield text with the extents, up to the first slice that the extension cannot handle.

        Such a slice is unreadable or may have an invalid entry.

        Args:
            as_json: True for JSON, False for the text table.  Each JSON line begins with the comma
                that separates it from the previous line.
            name: Name of the image, for the last column of the text table.
        """
        geometry = self._header.geometry
        ending = f"{name}\n".encode()
        # Start, length and first entry of the last extent so far.  Its line is not written yet,
        # because the next entries may continue it.
        pending = array("Q", (0, 0, UNALLOCATED))
        left = geometry.clusters(self.size)
        for table in self._tables:
            count = min(left, geometry.entries)
            # The range of a missing table is unallocated.  To save time, only one entry is passed
            # to the extension for it, and the extent is then extended by the rest of the range.
            rest = count - 1 if table == UNALLOCATED else 0
            for raw in self._slices(table, count - rest):
                if raw is None:
                    return
                text = self._write(raw, pending, ending, as_json=as_json)
                if text is None:
                    return
                yield text
                self.reached = pending[0]
            pending[1] += rest * geometry.cluster_size
            left -= count
        # The last extent is pending.  It is cut off at the end of the disk, because its last
        # cluster may reach past this end.  Then one more entry, of another kind, makes the
        # extension write the line of the pending extent.
        pending[1] = self.size - pending[0]
        other_kind = array("Q", (UNALLOCATED if pending[2] else 1,)).tobytes()
        text = self._write(other_kind, pending, ending, as_json=as_json)
        if text is not None:
            yield text
            self.reached = self.size

    def _slices(self, table: int, count: int) -> Iterator[bytes | None]:
        """Yield the first ``count`` entries of a table slice by slice; None for an unreadable one.

        A missing table (offset 0) is yielded as zeros.
        """
        left = count * ENTRY_BYTES
        position = table
        while left:
            length = min(left, SLICE_BYTES)
            yield bytes(length) if table == UNALLOCATED else self._read(position, length)
            position += length
            left -= length

    def _read(self, position: int, length: int) -> bytes | None:
        """Return a range of the file, zeros if it has no data; None if it cannot be read."""
        try:
            data = seek(self._fd, position, os.SEEK_DATA)
            if data is None or data >= position + length:
                return bytes(length)
            raw = os.pread(self._fd, length, position)
        except OSError:
            return None
        return raw if len(raw) == length else None

    def _write(
        self, raw: bytes, pending: array[int], ending: bytes, *, as_json: bool
    ) -> str | None:
        """Return the text of the extents that end within the entries ``raw``.

        ``pending`` is the extent that has not ended before ``raw`` (start, length, first entry).
        It is replaced by the extent that has not ended after ``raw``.
        Returns None, without a change, if one of the entries may be invalid.
        """
        limits = self._limits
        text = self._lines(
            raw,
            limits.cluster_size,
            limits.lowest_clear,
            limits.highest,
            self._sorted,
            limits.table_bytes,
            pending,
            as_json,
            ending,
        )
        return None if text is None else text.decode()


@contextmanager
def open_fast_map(path: str, *, share: bool = False) -> Iterator[FastMap | None]:
    """Open an image and yield its fast map; yield None if `mapping` must map the image.

    Errors are left to `mapping`, which raises them.

    Args:
        path: The image.
        share: Allow that another program writes to the image.
    """
    with ExitStack() as stack:
        found = None
        # The extension reads entries in the byte order of the host.  The entries of an image
        # are little-endian, so the extension is used on little-endian hosts only.
        lines = _load() if sys.byteorder == "little" else None
        if lines is not None:
            with suppress(OSError, QedError):
                lock = LockMode.to_read(share=share)
                fd = stack.enter_context(locked_descriptor(path, lock))
                found = _examine(fd, path, lines)
        yield found


def _examine(fd: int, path: str, lines: Lines) -> FastMap | None:
    """Return the map of an open image; None if `mapping` must map the image."""
    name = printable(path)
    header, size = read_header_of(fd, name)
    geometry = header.geometry
    used = geometry.l1_used(header.image_size) * ENTRY_BYTES
    if header.has_backing or used > _MAX_L1_BYTES or not used or len(name) > _MAX_NAME_CHARS:
        return None
    l1_table = os.pread(fd, used, header.l1_table_offset)
    if len(l1_table) < used:
        return None
    tables = decode(l1_table)
    limits = EntryLimits.for_l1(header, size)
    lowest = limits.lowest_clear
    is_valid = all(
        table == UNALLOCATED or (table >= lowest and limits.is_valid(table)) for table in tables
    )
    return FastMap(fd, header, tables, lines) if is_valid else None
