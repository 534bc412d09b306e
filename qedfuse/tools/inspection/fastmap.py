"""The map of an image without a backing file, written while its tables are read.

`qedfuse.tools.inspection.mapping` needs numpy and trio, which take longer to load than the
tables of a full image of 1 TiB take to be read.  So a small C extension (`_maplines.c`)
writes the lines as long as every entry is plainly valid.  At the first entry that is not, it
reports how far it got, and the caller continues with `mapping`.  The extension is optional:
without it everything is mapped by `mapping`, with the same output.
"""

from __future__ import annotations

import importlib
import os
import sys
from array import array
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from qedfuse.errors import QedError
from qedfuse.hostio.lockedfile import locked_descriptor, read_header_of
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.sparse import seek
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.table import SLICE_BYTES, decode
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.ondisk.header import Header

    Lines = Callable[[bytes, int, int, int, array[int], int, array[int], bool, bytes], bytes | None]

_MAX_L1_BYTES: Final = 1 << 22
"""An L1 table of which the disk uses more is left to `mapping`."""

_MAX_NAME_CHARS: Final = 4096
"""The extension allocates the name once for each extent; a longer one is left to `mapping`."""


def _load() -> Lines | None:
    """Return the extension's function; None if it was not built."""
    try:
        return importlib.import_module("qedfuse.tools.inspection._maplines").lines  # type: ignore[no-any-return]
    except ImportError:
        return None


_lines = _load()


class FastMap:
    """The map of an image without a base, whose header and L1 table are valid.

    Attributes:
        size: Bytes of the disk.
        reached: Guest offset up to which `lines` has yielded the extents.
    """

    def __init__(self, fd: int, header: Header, tables: array[int], lines: Lines) -> None:
        """Map an open image; ``tables`` are its L1 entries, as many as the disk uses."""
        self._fd = fd
        self._header = header
        self._tables = tables
        self._sorted = array("Q", sorted(set(tables) - {UNALLOCATED}))
        self._lines = lines
        self._limits = EntryLimits.for_l2(header, os.fstat(fd).st_size)
        self.size = header.image_size
        self.reached = 0

    def lines(self, *, as_json: bool, name: str) -> Iterator[str]:
        """Yield text with the extents, up to the first entry that is not read or may be invalid.

        Afterwards `reached` is less than `size` if there was such an entry.

        Args:
            as_json: Write JSON, in which each line begins with the comma after the previous
                line; else the lines of the table for people.
            name: The image, as the last column of the table.
        """
        geometry = self._header.geometry
        ending = f"{name}\n".encode()
        pending = array("Q", (0, 0, UNALLOCATED))
        left = geometry.clusters(self.size)
        for table in self._tables:
            count = min(left, geometry.entries)
            # The clusters of a missing table are all alike: one entry stands for them.
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
        # The last cluster may reach past the end of the disk.  An entry of another kind ends
        # the pending extent.
        pending[1] = self.size - pending[0]
        other_kind = array("Q", (UNALLOCATED if pending[2] else 1,)).tobytes()
        text = self._write(other_kind, pending, ending, as_json=as_json)
        if text is not None:
            yield text
            self.reached = self.size

    def _slices(self, table: int, count: int) -> Iterator[bytes | None]:
        """Yield the first ``count`` entries of a table, slice by slice; None for one not read."""
        left = count * ENTRY_BYTES
        position = table
        while left:
            length = min(left, SLICE_BYTES)
            yield bytes(length) if table == UNALLOCATED else self._read(position, length)
            position += length
            left -= length

    def _read(self, position: int, length: int) -> bytes | None:
        """Read a range of the file; return None if the host refuses or the file has shrunk.

        The caller then leaves the range to `mapping`, whose error names the file.
        """
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
        """Return the text of the extents that end within some entries; None if one may be invalid.

        ``pending`` is the extent that the next entries may continue: start, length, value.
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
    """Open an image that can be mapped fast; yield None if `mapping` must map it.

    Args:
        path: The image.
        share: Allow that another program writes to it.
    """
    with ExitStack() as stack:
        found = None
        # The extension reads entries in the byte order of the file.
        if _lines is not None and sys.byteorder == "little":
            with suppress(OSError, QedError):
                lock = LockMode.to_read(share=share)
                fd = stack.enter_context(locked_descriptor(path, lock))
                found = _examine(fd, path, _lines)
        yield found


def _examine(fd: int, path: str, lines: Lines) -> FastMap | None:
    """Return the map of an open image; None if it has a base or an invalid L1 entry.

    Raises:
        QedError: The header is invalid.
        OSError: The file cannot be read.
    """
    name = printable(path)
    header, size = read_header_of(fd, name)
    geometry = header.geometry
    used = geometry.l1_used(header.image_size) * ENTRY_BYTES
    if header.has_backing or used > _MAX_L1_BYTES or not used or len(name) > _MAX_NAME_CHARS:
        return None
    tables = decode(os.pread(fd, used, header.l1_table_offset))
    limits = EntryLimits.for_l1(header, size)
    lowest = limits.lowest_clear
    is_valid = all(
        table == UNALLOCATED or (table >= lowest and limits.is_valid(table)) for table in tables
    )
    return FastMap(fd, header, tables, lines) if is_valid else None
