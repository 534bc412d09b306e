"""A session whose reads and writes the extension carries out with the tables of an image.

Reads are answered from memory (``_cachedread.c``) or queued (``_queuedread.c``), and writes are
made to allocated clusters (``_inplacewrite.c``).
"""

from __future__ import annotations

import random
import struct
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qedfuse.disk.lookup.flattenedbacking import MIXED, ZEROS
from qedfuse.disk.space.epochs import Epochs
from qedfuse.hostio.pagesource import PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.handles import FAST_LOOKUP_MASK
from tests.support.fusewire import (
    FSYNC_SLOT,
    INIT_SLOT,
    NODE,
    READ,
    READ_SLOT,
    WRITE,
    WRITE_SLOT,
    Operation,
    Wire,
)

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.mount.fuse.requestcounters import RequestCounters

INODE = 2
BITS = 12
CLUSTER = 1 << BITS
SLICE_BITS = 2
CLUSTERS = 8
"""The disk of most tests has two slices of four clusters."""


def read_body(offset: int, size: int, handle: int) -> bytes:
    """Return the body of a read request."""
    return struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0)


class Session:
    """A session whose other reads and writes go to functions that answer nothing.

    Attributes:
        asked: The offsets and lengths of the reads that the function for reads got.
        passed: The offsets and the bytes of the writes that the function for writes got.
        wire: The session.
    """

    def __init__(self, *, can_splice: bool = False) -> None:
        """Make a session; see `Wire` for ``can_splice``."""
        self.asked: list[tuple[int, int]] = []
        self.passed: list[tuple[int, bytes]] = []
        self._kept = Operation(lambda _request, _inode: None)
        slots = (INIT_SLOT, READ_SLOT, WRITE_SLOT, FSYNC_SLOT)
        self.wire = Wire(filled=dict.fromkeys(slots, self._kept), can_splice=can_splice)
        assert extraops._extension is not None
        extraops._extension.set_data_handlers(self._read, self._write, None)

    def _write(self, _handle: int, offset: int, data: memoryview) -> bool:
        self.passed.append((offset, bytes(data)))
        return False

    def _read(self, _handle: int, offset: int, size: int) -> None:
        self.asked.append((offset, size))

    def show(self, *view: Any) -> None:  # noqa: ANN401  arguments of the extension
        """Let the extension answer reads of `INODE`."""
        self.show_all({INODE: view})

    def show_all(self, tables: dict[int, tuple[Any, ...]]) -> None:
        """Let the extension answer reads of disks, given by inode, with what makes their views."""
        assert extraops._extension is not None
        views = {inode: extraops._extension.read_view(*view) for inode, view in tables.items()}
        extraops._extension.set_read_views(views, FAST_LOOKUP_MASK % (1 << 64))

    def count(self, counters: RequestCounters) -> None:
        """Let the extension count all requests of the session."""
        assert extraops._extension is not None
        extraops._extension.set_counters(NODE, (counters.cells,))

    def send(self, offset: int, size: int, handle: int = INODE) -> int:
        """Let the kernel request a read; return the number of the request."""
        return self.wire.send(READ, read_body(offset, size, handle))

    def queue(self, offset: int, size: int, handle: int = INODE) -> int:
        """Let the kernel have a read for the next burst; return the number of the request."""
        return self.wire.queue(READ, read_body(offset, size, handle))

    def write(self, offset: int, data: bytes, handle: int = INODE) -> bool:
        """Let the kernel request a write; return False if the function was asked."""
        self.wire.answers.clear()
        self.passed.clear()
        head = struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, 0, 0)
        self.wire.send(WRITE, head + data)
        if self.passed:
            assert (self.passed, self.wire.answers) == ([(offset, data)], [])
            return False
        ((_number, error, answer),) = self.wire.answers
        assert (error, struct.unpack("=II", answer)) == (0, (len(data), 0))
        return True

    def read(self, offset: int, size: int, handle: int = INODE) -> bytes | None:
        """Return what the extension answers; None if the function was asked."""
        self.wire.answers.clear()
        self.asked.clear()
        self.send(offset, size, handle)
        if self.asked:
            assert (self.asked, self.wire.answers) == ([(offset, size)], [])
            return None
        ((_number, error, data),) = self.wire.answers
        assert error == 0
        return data


class Tables:
    """The tables of an image file, as `ReadTables` has them.

    Attributes:
        layer: The image.
        keys: The keys of the slices.
        slices: The slices by key, and the codes of `FlattenedBacking` for the first slice.
        policy: The policy of the file.
        content: The content of the file.
        base_policy: The policy of the backing file.
        base_content: The content of the backing file.
        epochs: What counts the queued reads.
        file_reads: What counts the reads of the two files, as `FileReads.cells`.
    """

    def __init__(self, path: Path) -> None:
        """Write a file; guest cluster n is cluster n + 1 of the file."""
        self.content = random.Random("file").randbytes((CLUSTERS + 1) * CLUSTER)
        path.write_bytes(self.content)
        self._file = path.open("rb")
        self.layer = SimpleNamespace(header=SimpleNamespace(image_size=CLUSTERS * CLUSTER))
        self.policy = ReadPolicy(can_queue=True)
        self.epochs = Epochs()
        self.file_reads = array("Q", bytes(4 * 8))
        entries = [(number + 1) * CLUSTER for number in range(CLUSTERS)]
        self.slices = {
            ("key", 0): SimpleNamespace(bad=None, entries=array("Q", entries[:4])),
            ("key", 1): SimpleNamespace(bad=None, entries=array("Q", entries[4:])),
        }
        self.keys = {0: ("key", 0), 1: ("key", 1)}
        self.base_content = random.Random("base").randbytes(CLUSTERS * CLUSTER)
        base_path = path.with_name("base")
        base_path.write_bytes(self.base_content)
        self._base = base_path.open("rb")
        self.base_policy = ReadPolicy()
        self.slices["codes", 0] = SimpleNamespace(
            bad=None, entries=array("Q", [MIXED, ZEROS, (3 * CLUSTER) | 3, (5 * CLUSTER) | 4])
        )

    def arguments(self, fd: int | None = None) -> tuple[object, ...]:
        """Return the arguments of a view; ``fd`` is the image file, None for the object's own."""
        if fd is None:
            fd = self._file.fileno()
        return (
            *(self.layer, self.keys, self.slices.get, "codes"),
            (PageSource(self.policy, fd), PageSource(self.base_policy, self._base.fileno())),
            *(BITS, SLICE_BITS, self.epochs, self.file_reads),
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._base.close()
