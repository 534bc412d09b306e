"""Images as file objects, for programs that are not asynchronous.

    import qedfuse

    with qedfuse.open("vm.qed", "r+b") as disk:
        disk.seek(446)
        table = disk.read(64)
        disk.write(bytes(64))
        disk.flush()  # now it survives power loss

Programs that run on trio use `qedfuse.open_disk` instead, and get the same `Disk` that
does the work here.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.text import printable
from qedfuse.util.portal import Portal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from qedfuse.disk.disk import Disk

_PIECE: Final = 1 << 24
"""Longer reads and writes are done in pieces of this many bytes, to bound the memory."""


def open(  # noqa: A001  a module's open, like gzip.open
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: Literal["rb", "r+b"] = "rb",
    *,
    options: OpenOptions | None = None,
) -> DiskFile:
    """Open the disk in an image as a binary file.

    The image is locked as QEMU locks it until the file is closed: ``rb`` keeps writers
    out, ``r+b`` everybody.  With ``r+b`` an image that was not closed cleanly is checked
    first, and refused if more than leaked space is wrong with it.

    Args:
        path: The image.
        mode: ``rb`` to read, ``r+b`` to read and write.
        options: Backing file policy, sharing, cache; whether it is writable is up to
            ``mode``.

    Raises:
        ValueError: Another mode.
        QedError: The image or a base cannot be opened, locked or trusted; each cause
            has a class of its own, and an ``errno``.
    """
    if mode not in ("rb", "r+b"):
        msg = f"mode: found {mode!r}, expected 'rb' or 'r+b'"
        raise ValueError(msg)
    name = os.fsdecode(path)
    options = replace(options or OpenOptions(), writable=mode == "r+b")
    manager = open_disk(name, options, inspector=inspect_image)
    return DiskFile(Portal(manager, f"qedfuse {printable(name)}"), mode)


class DiskFile(io.RawIOBase):
    """A disk as a seekable binary file; made by `qedfuse.open`.

    Reads and writes are complete, except at the end of the disk: there a read gives
    what there is and a write returns how much fitted; a write that begins at the end
    raises `NoSpaceError`.  Errors of the image and the host are raised as the
    `QedError` that they are, with ``errno`` set; misuse raises what other file objects
    raise (`ValueError` when closed, `io.UnsupportedOperation` for a write to ``rb``).

    Writes become durable with `flush` or `close`, or by themselves after some seconds.
    Threads may share a file; its operations then happen one after the other.  For many
    small reads wrap it in an `io.BufferedReader`.  A child made by ``os.fork`` cannot
    use the file.

    A file that is not closed is closed when it is collected or when the program ends,
    with a `ResourceWarning`; then errors can only be logged.

    Attributes:
        name: The image, as it was given to `open`.
        mode: ``rb`` or ``r+b``.
    """

    def __init__(self, portal: Portal[Disk], mode: str) -> None:
        """Wrap a disk that is open in a thread of its own."""
        self.mode = mode
        self.name = portal.value.path
        self._portal = portal
        self._disk = portal.value
        self._position = 0
        # Guards the position, and with it the order of operations.
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._disk.size

    def readable(self) -> bool:
        """Tell that reading is possible."""
        self._check_open()
        return True

    def writable(self) -> bool:
        """Tell whether the file was opened for writing."""
        self._check_open()
        return self.mode == "r+b"

    def seekable(self) -> bool:
        """Tell that seeking is possible."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Give the position in bytes."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position, which may lie past the end; return it."""
        with self._lock:
            self._check_open()
            starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
            if whence not in starts:
                msg = f"whence: found {whence}, expected 0, 1 or 2"
                raise ValueError(msg)
            position = starts[whence] + offset
            if position < 0:
                msg = f"position: found {position}, expected 0 or more"
                raise ValueError(msg)
            self._position = position
            return position

    def read(self, size: int | None = -1, /) -> bytes:
        """Read ``size`` bytes, or all; fewer only where the disk ends.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        with self._lock:
            self._check_open()
            left = max(0, self.size - self._position)
            wanted = left if size is None or size < 0 else min(left, size)
            pieces = [bytes(piece) for piece in self._pieces(wanted)]
            result = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._position += len(result)
            return result

    def readall(self) -> bytes:
        """Read from the position to the end of the disk."""
        return self.read()

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill ``buffer``; return how many bytes there were before the disk ended.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        with self._lock, memoryview(buffer).cast("B") as view:
            self._check_open()
            done = 0
            for piece in self._pieces(len(view)):
                view[done : done + len(piece)] = piece
                done += len(piece)
            self._position += done
            return done

    def _pieces(self, length: int) -> Iterator[bytes | bytearray]:
        """Read ``length`` bytes from the position on in pieces; the caller holds the lock."""
        start = self._position
        end = min(start + length, self.size)
        while start < end:
            piece = self._portal.call(self._disk.read, start, min(_PIECE, end - start))
            start += len(piece)
            yield piece

    def write(self, data: Buffer, /) -> int:
        """Write all bytes; return how many, fewer only where the disk ends.

        If an error is raised, part of the data may have been written; the position stays.

        Raises:
            NoSpaceError: The position is at or past the end, or the host is full.
            ReadOnlyError: A failed write-back has made the disk read-only.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.
        """
        with self._lock, memoryview(data).cast("B") as view:
            self._check_writable()
            done = 0
            # A first piece past the end raises; a later one would only be cut short.
            while done < len(view) and (not done or self._position + done < self.size):
                piece = view[done : done + _PIECE]
                done += self._portal.call(self._disk.write, self._position + done, piece)
            self._position += done
            return done

    def truncate(self, size: int | None = None, /) -> int:
        """Grow the disk to ``size`` bytes, or to the position; return the size.

        What is added reads as zeros; the position stays.

        Raises:
            UsageError: The disk would shrink, or the size is not a multiple of 512 or
                more than the image's tables can address.
            HostError: The host refused.
        """
        with self._lock:
            self._check_writable()
            wanted = self._position if size is None else size
            if wanted != self.size:
                self._portal.call(self._disk.resize, wanted)
            return wanted

    def flush(self) -> None:
        """Return when everything written so far survives power loss.

        Raises:
            HostError: The host could not do it; the disk is read-only from then on.
        """
        with self._lock:
            self._check_open()
            # The last flush of all, in `close`, is the disk's own.
            if self.mode == "r+b" and self._portal.is_alive():
                self._portal.call(self._disk.flush)

    def close(self) -> None:
        """Make everything durable, mark the image as clean and let go of it.

        Raises:
            HostError: Something could not be made durable.  The file is closed all the
                same, and the image will be checked when it is next opened.
        """
        with self._lock:
            if not self.closed:
                try:
                    self._portal.close()
                finally:
                    super().close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """Close a file that was forgotten."""
        if not self.closed:
            _warn(f"unclosed disk {self.name!r}", ResourceWarning, stacklevel=2, source=self)
            # Waiting could be for ever: the collector may be running in the thread that
            # we would wait for.
            self._portal.ask_to_close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        msg = "a DiskFile cannot be copied or pickled"
        raise TypeError(msg)

    def _check_open(self) -> None:
        if self.closed:
            msg = "I/O operation on closed file"
            raise ValueError(msg)

    def _check_writable(self) -> None:
        self._check_open()
        if self.mode != "r+b":
            msg = "not writable"
            raise io.UnsupportedOperation(msg)
