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
_MAX_NAME_CHARS: Final = 4096


def _load() -> Lines | None:
    """Load the extension; None if it was not built."""
    try:
        return importlib.import_module("qedfuse.tools.inspection._maplines").lines  # type: ignore[no-any-return]
    except ImportError:
        return None


_lines = _load()


class FastMap:
    """An image whose header and L1 table are plainly right, and that has no base.

    Attributes:
        size: Bytes of the disk.
        reached: How far `lines` got: what is before that is written.
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
        """Write the extents up to the end, or up to a doubt; `reached` tells.

        A line of JSON begins with the comma after the line before it.  ``name`` is what the
        lines for people end with.
        """
        geometry = self._header.geometry
        ending = f"{name}\n".encode()
        pending = array("Q", (0, 0, UNALLOCATED))
        left = geometry.clusters(self.size)
        for table in self._tables:
            count = min(left, geometry.entries)
            # The clusters of a table that is not there are one like the other.
            rest = count - 1 if table == UNALLOCATED else 0
            for raw in self._pieces(table, count - rest):
                text = self._write(raw, pending, ending, as_json=as_json)
                if text is None:
                    return
                yield text
                self.reached = pending[0]
            pending[1] += rest * geometry.cluster_size
            left -= count
        # The last cluster may be more than the disk has; a piece that is not data ends it.
        pending[1] = self.size - pending[0]
        closing = array("Q", (UNALLOCATED if pending[2] else 1,)).tobytes()
        text = self._write(closing, pending, ending, as_json=as_json)
        if text is not None:
            yield text
            self.reached = self.size

    def _pieces(self, table: int, count: int) -> Iterator[bytes]:
        """Read a table piece by piece, as far as it describes the disk."""
        left = count * ENTRY_BYTES
        position = table
        while left:
            length = min(left, SLICE_BYTES)
            if table == UNALLOCATED or self._is_hole(position, length):
                yield bytes(length)
            else:
                yield os.pread(self._fd, length, position)
            position += length
            left -= length

    def _is_hole(self, position: int, length: int) -> bool:
        """Tell whether the host has nothing for a range of the file."""
        data = seek(self._fd, position, os.SEEK_DATA)
        return data is None or data >= position + length

    def _write(
        self, raw: bytes, pending: array[int], ending: bytes, *, as_json: bool
    ) -> str | None:
        """Write what some entries add; None at a doubt."""
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
    """Open an image if it is plainly right and has no base; None where somebody else must look.

    With ``share`` it may be in use.
    """
    with ExitStack() as stack:
        found = None
        # The extension takes tables in the byte order of most machines.
        if _lines is not None and sys.byteorder == "little":
            with suppress(OSError, QedError):
                lock = LockMode.to_read(share=share)
                fd = stack.enter_context(locked_descriptor(path, lock))
                found = _look(fd, path, _lines)
        yield found


def _look(fd: int, path: str, lines: Lines) -> FastMap | None:
    """Return the map of an open image; None if `qedfuse.tools.inspection.mapping` must map it."""
    name = printable(path)
    header, size = read_header_of(fd, name)
    geometry = header.geometry
    used = geometry.l1_used(header.image_size) * ENTRY_BYTES
    if header.has_backing or used > _MAX_L1_BYTES or not used or len(name) > _MAX_NAME_CHARS:
        return None
    tables = decode(os.pread(fd, used, header.l1_table_offset))
    limits = EntryLimits.for_l1(header, size)
    lowest = limits.lowest_clear
    plain = all(
        table == UNALLOCATED or (table >= lowest and limits.is_valid(table)) for table in tables
    )
    return FastMap(fd, header, tables, lines) if plain else None
