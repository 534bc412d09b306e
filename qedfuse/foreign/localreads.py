"""Reads of a chain's files without QEMU, where the files have the bytes of the disk unchanged."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, QedError
from qedfuse.foreign.confined import end_process
from qedfuse.foreign.mapping import fill_map, start_mapping
from qedfuse.foreign.runmap import MAX_FILES, UNKNOWN, RunMap, without_zeros
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.pagesource import PageSource, StoredRuns
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from qedfuse.foreign.graph import Graph
    from qedfuse.foreign.runmap import Part
    from qedfuse.hostio.posixfile import PosixFile
    from qedfuse.util.deferredclose import DeferredClose

_log = logging.getLogger(__name__)

LOOKUPS_BEFORE_MAP: Final = 16
"""Number of lookups of `UNKNOWN` parts after which `LocalReads` begins to make its map.

A command that reads only the partition table makes fewer lookups, so no map is made for it.
"""
_START_SECONDS: Final = 5.0
"""Maximum time for which `LocalReads.start_map` waits for the start of ``qemu-img map``."""
_JOIN_SECONDS: Final = 5.0
"""Maximum time for which `LocalReads.close` waits for the thread after killing its program."""


class LocalReads:
    """Reads parts of a disk from the files that store them, by a map made in the background.

    The map is valid as long as no program changes the files.  So this process locks all of
    `Graph.files` before it makes the map, and holds the locks until the files are closed.  The
    locks of qemu-nbd do not suffice, because qemu-nbd may end earlier.  The extents of a VMDK image
    are not locked; the lock on the image's own file keeps out programs that open the image.  If a
    lock is refused, the map stays empty.  If the file system has no locks, the map is made without
    them.

    There is no map at all if locking is off, if the number of files with data is 0 or more than
    `MAX_FILES`, or if the host has no memory for a map.
    """

    def __init__(
        self, graph: Graph, name: str, open_files: DeferredClose, *, is_locked: bool
    ) -> None:
        """Prepare to read the files of a graph; the constructor reads and starts nothing.

        Args:
            graph: The files.
            name: The name of the image in messages.
            open_files: Closes the files, after the thread that makes the map has ended.
            is_locked: Whether to lock the files.  If False, no map is made.
        """
        self._graph = graph
        self._open_files = open_files
        self._name = name
        self._files: tuple[PosixFile, ...] = tuple(
            {id(file): file for file in graph.data_files if file is not None}.values()
        )
        self._map: RunMap | None = None
        self._lock = threading.Lock()
        """Held while the attributes below are changed, and while the thread or the program is
        started; never while a thread waits for the program's output or end."""
        self._lookups_before_map = LOOKUPS_BEFORE_MAP
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._has_started = threading.Event()
        """Set when the program has been started, or will not be started."""
        if is_locked and 0 < len(self._files) <= MAX_FILES:
            with suppress(OSError):
                self._map = RunMap()

    @property
    def page_source(self) -> PageSource | None:
        """What the mount's extension needs to read the mapped ranges; None if there is no map."""
        if self._map is None:
            return None
        sources = tuple(file.page_source for file in self._files)
        runs = StoredRuns(self._map.cells, self._map.capacity, sources)
        return sources[0]._replace(runs=runs)

    def parts(self, offset: int, length: int) -> list[Part] | None:
        """Return the parts of a range; None if all are `UNKNOWN`, or if there is no map.

        After `LOOKUPS_BEFORE_MAP` lookups of unknown ranges, begins to make the map.
        """
        if self._map is None:
            return None
        found = list(self._map.parts(offset, length))
        if all(part.file == UNKNOWN for part in found):
            if self._lookups_before_map:
                self._count_lookup()
            return None
        return found

    def file_of(self, part: Part) -> PosixFile:
        """Return the file that has the bytes of ``part``, which must not be unknown or zeros."""
        return self._files[part.file]

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache; return False if that would block or fail.

        Also returns False if the map does not have the whole range.
        """
        found = self.parts(offset, len(view))
        if found is None or any(part.file == UNKNOWN for part in found):
            return False
        return all(
            self._files[part.file].try_read(part.offset, into)
            for part, into in without_zeros(found, offset, view)
        )

    def try_start(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool | None:
        """Start a read in a native thread, if one file has the range as one run.

        Returns whether the read was started: see `ReadableFile.try_start_read`.  Returns None if
        QEMU must read the whole range.
        """
        found = self.parts(offset, len(view))
        if found is None:
            return None
        if len(found) > 1 or found[0].file < 0:
            return False
        file = self._files[found[0].file]
        return file.try_start_read(found[0].offset, view, take_answer, ended)

    def require_whole(self, part: Part, count: int) -> None:
        """Raise if a read of a part has returned fewer bytes than the part has.

        Raises:
            HostError: A file has become shorter while it was open.
        """
        if count < part.length:
            msg = (
                f"{self.file_of(part).name}: data at {part.offset}: found {count} bytes, "
                f"expected {part.length}"
            )
            raise HostError(msg)

    def close(self) -> None:
        """Stop making the map, and wait for the end of the thread, at most `_JOIN_SECONDS`."""
        with self._lock:
            self._is_closed = True
            process, thread = self._process, self._thread
            if process is not None:
                process.kill()
        if thread is not None:
            thread.join(_JOIN_SECONDS)

    def start_map(self) -> None:
        """Begin to make the map if this has not begun yet; wait until the program runs.

        A process that will give up the right to run programs must call this method before that.
        The call waits at most `_START_SECONDS`.
        """
        with self._lock:
            self._lookups_before_map = 0
            self._start_thread()
            is_started = self._thread is not None
        if is_started:
            self._has_started.wait(_START_SECONDS)

    def _count_lookup(self) -> None:
        """Count down the lookups before the map, and start its thread at 0."""
        with self._lock:
            self._lookups_before_map = max(0, self._lookups_before_map - 1)
            if not self._lookups_before_map:
                self._start_thread()

    def _start_thread(self) -> None:
        """Start the thread that makes the map, unless it was started; the caller holds the lock.

        If the host cannot start a thread, `LOOKUPS_BEFORE_MAP` further lookups lead to a new
        attempt.
        """
        if self._map is None or self._thread is not None or self._is_closed:
            return
        if self._open_files.enter():
            try:
                self._thread = start_thread(self._make_map, self._map, name="qedfuse map")
            except OSError as error:
                self._open_files.leave()
                self._lookups_before_map = LOOKUPS_BEFORE_MAP
                _log.debug("%s: no map yet: %s", self._name, error.strerror)

    def _make_map(self, run_map: RunMap) -> None:
        """Make the map; if that fails, only log the error: QEMU reads what the map lacks."""
        try:
            for file in self._graph.files:
                lock_image(file.fd, LockMode.READ, file.name)
            self._run_program(run_map)
            _log.debug("%s: the map ends at %d", self._name, run_map.end)
        except (QedError, OSError) as error:
            _log.debug("%s: the map ends at %d: %s", self._name, run_map.end, error)
        finally:
            self._has_started.set()
            self._open_files.leave()

    def _run_program(self, run_map: RunMap) -> None:
        """Run ``qemu-img map``, and add what it prints to the map; do nothing after `close`."""
        numbers = {id(file): number for number, file in enumerate(self._files)}
        files = [
            None if file is None else (numbers[id(file)], file.size())
            for file in self._graph.data_files
        ]
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb", buffering=0) as output:
            try:
                with self._lock:
                    if self._is_closed:
                        return
                    process = self._process = start_mapping(self._graph, self._name, write_end)
            finally:
                os.close(write_end)
                self._has_started.set()
            try:
                fill_map(run_map, output, files)
            finally:
                with self._lock:
                    # `close` must not kill a process that has been waited for: its number may be
                    # reused.
                    self._process = None
                end_process(process)
