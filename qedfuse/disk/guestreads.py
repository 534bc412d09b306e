"""Reads of a disk: what a guest can request without changing the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.seek import next_data, next_hole

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.components import Components
    from qedfuse.disk.datapath.readtables import ReadTables
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.hostio.hostfile import HostFile


class GuestReads:
    """Reads an opened image with its chain; tasks may call all methods concurrently."""

    def __init__(self, components: Components) -> None:
        """Read the disk that consists of ``components``."""
        # Copied from the components, so that requests need one attribute lookup less.
        self._components = components
        self._file = components.file
        self._layer = components.layer
        self._chain = components.chain
        self._file_reads = components.chain.file_reads
        self._epochs = components.epochs
        self._fast_path = components.fast_path

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._layer.size

    @property
    def chain(self) -> Chain:
        """The image and those of its bases that are open."""
        return self._chain

    @property
    def damaged(self) -> bool:
        """Whether damage of the image itself, not of a base, was found since the opening."""
        return self._layer.damaged

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored in the whole chain.

        The part of the range past the end of the disk is left out, so the list may be empty.

        Raises:
            HostError: The host cannot read a table.
        """
        length = max(0, min(length, self.size - start))
        return await self._chain.extents(start, length) if length else []

    def try_read(self, start: int, length: int) -> memoryview | None:
        """Read a range without waiting; return None if that would block or fail.

        Returns None also for some ranges, such as one that ends past the end of the disk
        (`FastPath.try_read`).  After None the caller must use `read`.  The next call of this method
        or of `try_write` may overwrite the returned view.
        """
        return self._fast_path.try_read(start, length)

    def tables_for_reads(self) -> ReadTables:
        """Return the objects with which the mount's C extension answers reads without Python."""
        return self._fast_path.tables_for_reads(self._epochs)

    @property
    def should_try_read(self) -> bool:
        """Whether `try_read` may succeed for the data of the top image, by its `ReadPolicy`."""
        return _is_inline(self._file)

    def try_locate(self, start: int, length: int) -> tuple[int, int, HostFile] | None:
        """Return where a range is stored, without waiting: a descriptor, a file offset, the file.

        Returns None if the range is not known to be one run in one local file, or if the event loop
        must not read from the file.  The result is valid until the caller awaits something.
        """
        location = self._fast_path.locate(start, length)
        if location is None:
            return None
        file, offset = location
        if file.fileno() < 0 or not _is_inline(file):
            return None
        return file.fileno(), offset, file

    def count_read(self, file: HostFile, length: int) -> None:
        """Count that the caller has read ``length`` bytes of a file that `try_locate` returned."""
        self._file_reads.count(file, length)

    def try_start_read(
        self,
        start: int,
        length: int,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read that `try_read` could not make; return whether a read was started.

        Returns False if the range is not known to be one run in one file.  Otherwise returns what
        `HostFile.try_start_read` returns; see there for ``take_answer`` and ``ended``.

        Raises:
            OSError: No thread exists, and none could be created.  ``ended`` is not called.
        """
        location = self._fast_path.locate(start, length)
        if location is None:
            return False
        file, offset = location
        epoch = self._epochs.enter()

        def leave(result: int) -> None:
            self._epochs.leave(epoch)
            if result == length:
                self._file_reads.count(file, length)
            ended(result)

        is_started = False
        try:
            is_started = file.try_start_read(
                offset, memoryview(bytearray(length)), take_answer, leave
            )
        finally:
            if not is_started:
                self._epochs.leave(epoch)
        return is_started

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes; fewer if the disk ends earlier, and none at or past its end.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            BackingError: The range needs a base that was not opened.
            HostError: The host cannot read a file.
        """
        length = max(0, min(length, self.size - start))
        epoch = self._epochs.enter()
        try:
            location = self._fast_path.locate(start, length)
            if location is not None:
                # The tables are in memory; only the data must come from the host.
                file, offset = location
                data = await file.pread(offset, length)
                if len(data) == length:
                    self._file_reads.count(file, length)
                    return data
            return await self._chain.read(start, length)
        finally:
            self._epochs.leave(epoch)

    async def next_data(self, start: int) -> int | None:
        """Return the guest offset of the first data at or past ``start``; None if there is none.

        Raises:
            HostError: The host cannot read a file.
        """
        return await next_data(self._chain, start)

    async def next_hole(self, start: int) -> int:
        """Return the guest offset of the first hole at or past ``start``.

        The end of the disk counts as a hole.  Past the end, the result is the size of the disk.

        Raises:
            HostError: The host cannot read a file.
        """
        return await next_hole(self._chain, start)


def _is_inline(file: HostFile) -> bool:
    """Return whether the event loop may read from a file, by the file's `ReadPolicy`."""
    return file.read_policy is None or file.read_policy.is_inline
