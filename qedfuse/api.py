"""The disk in an image as a file object, for programs that are not asynchronous.

    import qedfuse

    with qedfuse.open("vm.qed", "r+b") as disk:
        disk.seek(446)
        table = disk.read(64)
        disk.write(bytes(64))
        disk.flush()  # from here on the write survives power loss

Programs that use trio call `qedfuse.open_disk` instead, which returns the `Disk` that such
a file object wraps.
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

_MAX_CALL_BYTES: Final = 1 << 24
"""Longer reads and writes are split into calls of this many bytes, to bound the memory."""


def open(  # noqa: A001  a module's open, like gzip.open
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: Literal["rb", "r+b"] = "rb",
    *,
    options: OpenOptions | None = None,
) -> DiskFile:
    """Open the disk in an image as an unbuffered binary file.

    The image is locked as QEMU locks it until the file is closed: with ``rb`` no other
    program can write to it, with ``r+b`` none can read it either.  With ``r+b`` an image
    that was not closed cleanly is checked first, and refused if the check finds more than
    leaked space.

    Args:
        path: The image.
        mode: ``rb`` to read, ``r+b`` to read and write.
        options: Backing file policy, sharing, cache size; ``mode`` overrides its
            ``writable``.

    Raises:
        ValueError: The mode is another one.
        QedError: The image or a base cannot be opened or locked, is damaged, or is not
            allowed; each cause has a class of its own, and an ``errno``.
    """
    if mode not in ("rb", "r+b"):
        msg = f"mode: found {mode!r}, expected 'rb' or 'r+b'"
        raise ValueError(msg)
    name = os.fsdecode(path)
    options = replace(options or OpenOptions(), writable=mode == "r+b")
    manager = open_disk(name, options, inspector=inspect_image)
    return DiskFile(Portal(manager, f"qedfuse {printable(name)}"), mode)


class DiskFile(io.RawIOBase):
    """A disk as a seekable binary file, as `qedfuse.open` returns it.

    Reads and writes are short only at the end of the disk; a write that begins at or past
    the end raises `NoSpaceError`.  Failures of the image or the host raise a `QedError`
    with ``errno`` set; misuse raises the same exceptions as other file objects
    (`ValueError` if closed, `io.UnsupportedOperation` for a write to ``rb``).

    Writes become durable with `flush` or `close`, or in the background after some seconds.
    Threads may share a file; its operations are serialised.  For many small reads, wrap
    the file in an `io.BufferedReader`.  A child of ``os.fork`` cannot use the file.

    A file that the program does not close is closed when it is garbage collected or when
    the program ends, with a `ResourceWarning`; errors are then only logged.

    Attributes:
        name: The path of the image, as given to `open`.
        mode: ``rb`` or ``r+b``.
    """

    def __init__(self, portal: Portal[Disk], mode: str) -> None:
        """Wrap the disk that ``portal`` has opened in its own thread."""
        self.mode = mode
        self.name = portal.value.path
        self._portal = portal
        self._disk = portal.value
        self._position = 0
        # Guards the position, and serialises operations.
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._disk.size

    def readable(self) -> bool:
        """Return True.

        Raises:
            ValueError: The file is closed.
        """
        self._check_open()
        return True

    def writable(self) -> bool:
        """Return whether the file was opened for writing.

        Raises:
            ValueError: The file is closed.
        """
        self._check_open()
        return self.mode == "r+b"

    def seekable(self) -> bool:
        """Return True.

        Raises:
            ValueError: The file is closed.
        """
        self._check_open()
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, which may lie past the end, and return it.

        Raises:
            ValueError: ``whence`` is unknown, or the position would be negative.
        """
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
        """Read ``size`` bytes, or up to the end; fewer only at the end of the disk.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        with self._lock:
            self._check_open()
            left = max(0, self.size - self._position)
            wanted = left if size is None or size < 0 else min(left, size)
            chunks = [bytes(chunk) for chunk in self._chunks(wanted)]
            result = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._position += len(result)
            return result

    def readall(self) -> bytes:
        """Read from the position to the end of the disk."""
        return self.read()

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end of the disk.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        with self._lock, memoryview(buffer).cast("B") as view:
            self._check_open()
            done = 0
            for chunk in self._chunks(len(view)):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
            self._position += done
            return done

    def _chunks(self, length: int) -> Iterator[bytes | bytearray]:
        """Read up to ``length`` bytes from the position on; the caller holds the lock."""
        start = self._position
        end = min(start + length, self.size)
        while start < end:
            chunk = self._portal.call(self._disk.read, start, min(_MAX_CALL_BYTES, end - start))
            start += len(chunk)
            yield chunk

    def write(self, data: Buffer, /) -> int:
        """Write ``data``; return the number of bytes, fewer only at the end of the disk.

        If an error is raised, part of the data may have been written, and the position is
        unchanged.

        Raises:
            NoSpaceError: The position is at or past the end, or the host is full.
            ReadOnlyError: A failed metadata writeback has made the disk read-only.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host's file system or kernel refused.
        """
        with self._lock, memoryview(data).cast("B") as view:
            self._check_writable()
            done = 0
            # A write that begins past the end raises, but one that crosses the end is cut
            # short; therefore only the first call may begin past the end.
            while done < len(view) and (not done or self._position + done < self.size):
                chunk = view[done : done + _MAX_CALL_BYTES]
                done += self._portal.call(self._disk.write, self._position + done, chunk)
            self._position += done
            return done

    def truncate(self, size: int | None = None, /) -> int:
        """Grow the disk to ``size`` bytes, or to the position; return the size.

        The added range reads as zeros; the position is unchanged.

        Raises:
            UsageError: The disk would shrink, or the size is not a multiple of 512 or
                more than the image's tables can address.
            HostError: The host's file system or kernel refused.
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
            HostError: The host reported a failure; the disk is read-only from then on.
        """
        with self._lock:
            self._check_open()
            # IOBase.close() flushes once more, after the portal has closed the disk.
            if self.mode == "r+b" and self._portal.is_alive():
                self._portal.call(self._disk.flush)

    def close(self) -> None:
        """Make everything durable, mark the image as clean and release its locks.

        Raises:
            HostError: Something could not be made durable.  The file is closed
                nevertheless, and the image will be checked when it is next opened for
                writing.
        """
        with self._lock:
            if not self.closed:
                try:
                    self._portal.close()
                finally:
                    super().close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """Start to close a file that the program has not closed, and warn."""
        if not self.closed:
            _warn(f"unclosed disk {self.name!r}", ResourceWarning, stacklevel=2, source=self)
            # Waiting could deadlock: the garbage collector may be running in the portal's
            # own thread.
            self._portal.ask_to_close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: Always.
        """
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
