"""The disk of an image that QEMU serves, as a file of a chain: a read-only `HostFile`."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ForeignError, HostError
from qedfuse.foreign.directreads import DirectReads
from qedfuse.foreign.runmap import UNKNOWN, Part, without_zeros
from qedfuse.hostio.readonlyfile import ReadOnlyFile

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from qedfuse.foreign.graph import Graph
    from qedfuse.foreign.localreads import LocalReads
    from qedfuse.foreign.process import QemuNbd
    from qedfuse.hostio.hostfile import FileIdentity, ReadableFile
    from qedfuse.hostio.pagesource import PageSource
    from qedfuse.util.deferredclose import DeferredClose

_log = logging.getLogger(__name__)

READ_SECONDS: Final = 600.0
"""Maximum time for which a read waits for qemu-nbd, which itself can wait for the host's disk."""


class ForeignFile(ReadOnlyFile):
    """A disk that qemu-nbd serves; the file has the bytes that the guest sees.

    After qemu-nbd has ended, every read that needs it fails.  qemu-nbd is not started again: its
    locks ended with it, so another program may have changed a file of the chain since then.

    Attributes:
        path: The path of the image.
        driver: The format of the image as QEMU calls it.
        image: The open file of the image.
        graph: The files of the image and its bases.
    """

    def __init__(
        self,
        graph: Graph,
        disk: ReadableFile,
        server: QemuNbd,
        open_files: DeferredClose,
        local: LocalReads,
    ) -> None:
        """Make the file; its `close` closes the objects that are passed, and ends qemu-nbd.

        Args:
            graph: The files of the image and its bases.
            disk: The disk as a file, whose reads go to ``server``.
            server: The process of qemu-nbd.
            open_files: Closes the files that qemu-nbd reads: the image and those that it names.
            local: Reads these files directly, where they have the bytes of the disk.
        """
        top = graph.images[0]
        super().__init__(top.file.name)
        self.path = top.file.path
        self.driver = top.driver
        self.image = top.file
        self.graph = graph
        self._disk = disk
        self._server = server
        self._open_files = open_files
        self._local = local
        self._direct = DirectReads(server, disk.size(), READ_SECONDS)
        self._is_failure_logged = False
        self._is_stopped = False
        self._is_closed = False

    @property
    def identity(self) -> FileIdentity:
        """The identity of the file of the image."""
        return self.image.identity

    @property
    def page_source(self) -> PageSource | None:
        """What the mount's extension needs to read without QEMU; see `ReadableFile`."""
        return self._local.page_source

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes at an offset; fewer only where the disk ends."""
        if self._local.parts(offset, length) is not None:
            return await super().pread(offset, length)
        with self._explained():
            return await self._disk.pread(offset, length)

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from an offset; return how many bytes were read; see `ReadableFile`."""
        length = max(0, min(len(view), self.size() - offset))
        for part, into in without_zeros(self._parts(offset, length), offset, view):
            if part.file == UNKNOWN:
                with self._explained():
                    await self._disk.pread_into(part.start, into)
            else:
                count = await self._local.file_of(part).pread_into(part.offset, into)
                self._local.require_whole(part, count)
        return length

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from an offset; see `ReadableFile.read_blocking`."""
        length = max(0, min(len(view), self.size() - offset))
        for part, into in without_zeros(self._parts(offset, length), offset, view):
            if part.file == UNKNOWN:
                with self._explained():
                    self._disk.read_blocking(part.start, into)
            else:
                count = self._local.file_of(part).read_blocking(part.offset, into)
                self._local.require_whole(part, count)
        return length

    def start_map(self) -> None:
        """Begin to make the map of the disk, unless this has begun; see `LocalReads.start_map`."""
        self._local.start_map()

    def _parts(self, offset: int, length: int) -> list[Part]:
        """Return the parts of a range: each lies in one file, is zeros, or needs qemu-nbd."""
        return self._local.parts(offset, length) or [Part(UNKNOWN, 0, offset, length)]

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without blocking; return whether that succeeded."""
        return self._local.try_read(offset, view)

    def try_start_read(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read in a thread that answers a request; see `ReadableFile.try_start_read`."""
        is_started = self._local.try_start(offset, view, take_answer, ended)
        if is_started is None:
            return self._direct.try_start(offset, view, take_answer, ended)
        return is_started

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if no data follows."""
        with self._explained():
            return await self._disk.next_data(offset)

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins; see `ReadableFile`."""
        with self._explained():
            return await self._disk.next_hole(offset)

    def size(self) -> int:
        """Return the size of the disk in bytes."""
        return self._disk.size()

    def stored_blocks(self) -> int:
        """Return the number of blocks of 512 bytes that the file of the image takes up."""
        return self.image.stored_blocks()

    def stat(self) -> os.stat_result:
        """Return the attributes of the file of the image."""
        return self.image.stat()

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system that holds the image."""
        return self.image.statvfs()

    def stop_fetching(self) -> None:
        """Kill qemu-nbd, so that all reads that need it fail: those that wait, and later ones."""
        self._is_stopped = True
        # Kill the program first: a thread may wait for it in the handshake of a new connection,
        # which the calls below do not know yet.
        self._server.kill()
        self._direct.close()
        self._disk.stop_fetching()

    def close(self) -> None:
        """Close the disk and all files, and end qemu-nbd; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._local.close()
        self.disconnect()
        self._server.close()
        self._open_files.close()

    def disconnect(self) -> None:
        """Close the connections to qemu-nbd, and nothing else."""
        self._direct.close()
        self._disk.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """If qemu-nbd has ended by itself, replace a HostError of the block by a ForeignError."""
        try:
            yield
        except HostError as error:
            if self._is_closed or self._is_stopped or not self._server.has_ended():
                raise
            failure = ForeignError(f"{self.name}: qemu-nbd: {self._server.end_reason()}")
            failure.is_logged = True
            if not self._is_failure_logged:
                self._is_failure_logged = True
                _log.error("%s; reads that need QEMU fail from now on", failure)
            raise failure from error
