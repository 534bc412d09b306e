"""Opening an image that only QEMU can read, as a file of a chain of images."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from qedfuse.errors import ForeignError, HostError, ImageInUseError
from qedfuse.foreign.foreignfile import READ_SECONDS, ForeignFile
from qedfuse.foreign.graph import open_graph
from qedfuse.foreign.localreads import LocalReads
from qedfuse.foreign.process import READY_SECONDS, QemuNbd
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.nbd.opening import open_nbd
from qedfuse.remote.options import Deadlines
from qedfuse.util.deferredclose import DeferredClose, close_all

if TYPE_CHECKING:
    import socket

    from qedfuse.foreign.graph import Limits
    from qedfuse.hostio.posixfile import PosixFile


class ForeignOpening:
    """An image that is opened in two steps; only the second, `finish`, waits for qemu-nbd."""

    def __init__(self, image: PosixFile, driver: str, limits: Limits) -> None:
        """Open the files that an image names, and start qemu-nbd.

        The calling thread must not end before the file that `finish` returns is closed (`QemuNbd`).

        Args:
            image: The file of the image, closed by a failed constructor, `abandon` or
                `ForeignFile.close`.
            driver: The format of the image as QEMU calls it.
            limits: Which files the images of the chain may name.

        Raises:
            BackingError: A file that the image names is missing or refused.
            ForeignError: qemu-nbd is not installed, or `open_graph` refuses an image.
            ImageError: The header of a QED image of the chain is not valid.
            HostError: A file cannot be read, or a system call failed.
        """
        self._image = image
        self._is_locked = limits.lock and not limits.share
        self._lock = threading.Lock()
        """Guards the next two attributes: `finish` and `abandon` must agree who closes files."""
        self._is_abandoned = False
        self._file: ForeignFile | None = None
        try:
            self._graph = open_graph(image, driver, limits)
            try:
                self._server = QemuNbd(self._graph, image.name)
            except BaseException:
                self._graph.close()
                raise
        except BaseException:
            image.close()
            raise
        self._open_files = DeferredClose(self._close_files)

    def finish(self) -> ForeignFile:
        """Wait until qemu-nbd serves the image; return a file for it, which the caller must close.

        The call blocks, and fails if another thread calls `abandon` meanwhile.  After any other
        failure the caller must call `abandon`.

        Raises:
            ForeignError: qemu-nbd refuses the image, has ended, or does not answer; an image was
                changed during the opening; or the opening was abandoned.
            ImageError: The header of a QED image of the chain is not valid any more.
            ImageInUseError: Another program holds a lock that excludes reading.
            HostError: A system call or the connection for reads failed.
        """
        try:
            self._server.wait_ready()
        except ImageInUseError:
            self._name_holder()
            raise
        self._refuse_changes()
        deadlines = Deadlines(READY_SECONDS, READ_SECONDS, READ_SECONDS)
        disk = open_nbd(self._connect, "", self._image.name, deadlines)
        local = LocalReads(
            self._graph, self._image.name, self._open_files, is_locked=self._is_locked
        )
        file = ForeignFile(self._graph, disk, self._server, self._open_files, local)
        with self._lock:
            if not self._is_abandoned:
                self._file = file
                return file
        file.disconnect()  # all else is closed by `abandon`
        raise self._abandoned_error()

    def abandon(self) -> None:
        """End qemu-nbd and close all files, also while `finish` runs in another thread."""
        with self._lock:
            self._is_abandoned = True
            file = self._file
        self._server.kill()
        if file is not None:
            file.close()
            return
        self._server.close()
        self._open_files.close()

    def _refuse_changes(self) -> None:
        """Call `Graph.refuse_changes`; raise ForeignError if `abandon` was called before."""
        if not self._open_files.enter():
            raise self._abandoned_error()
        try:
            self._graph.refuse_changes()
        finally:
            self._open_files.leave()

    def _abandoned_error(self) -> ForeignError:
        """Return the error for an opening that was abandoned."""
        return ForeignError(f"{self._image.name}: the opening was abandoned")

    def _name_holder(self) -> None:
        """Lock the files of the chain, to get an error that names the file and the process.

        QEMU's own message names neither.
        """
        if not self._open_files.enter():
            return
        try:
            for file in (*self._graph.files, *self._graph.extents):
                with suppress(HostError):  # QEMU's message stays
                    lock_image(file.fd, LockMode.READ, file.name)
        finally:
            self._open_files.leave()

    def _close_files(self) -> None:
        """Close the image and the files that it names."""
        close_all([self._graph, self._image])

    def _connect(self) -> socket.socket:
        """Return a new connection to qemu-nbd; raise ForeignError if qemu-nbd has ended."""
        if self._server.has_ended():
            msg = f"{self._image.name}: qemu-nbd: {self._server.end_reason()}"
            raise ForeignError(msg)
        return self._server.connect()
