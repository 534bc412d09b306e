"""The disk in an image as a file object, for programs that are not asynchronous.

    import qedfuse

    with qedfuse.open("vm.qed", "r+b") as disk:
        disk.seek(446)
        table = disk.read(64)
        disk.seek(446)
        disk.write(bytes(64))
        disk.flush()  # from here on the write survives power loss

Programs that use trio call `qedfuse.open_disk` instead.  Its ``async with`` block gets a `Disk`,
the asynchronous object that a `DiskFile` wraps.
"""

from __future__ import annotations

import io
import operator
import os
import threading
import warnings
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, NoReturn, SupportsIndex

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.disk import Disk
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.remote.address import shown_name, without_secrets
from qedfuse.util.portal import Portal
from qedfuse.util.portalcall import PortalClosedError
from qedfuse.util.portalthreads import in_portal_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer


_MAX_CALL_BYTES: Final = 1 << 24
"""Maximum number of bytes in one call of `Disk.read` or `Disk.write`."""


def open(  # noqa: A001  a module's open, like gzip.open
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: Literal["rb", "r+b"] = "rb",
    *,
    options: OpenOptions | None = None,
) -> DiskFile:
    """Open the disk in an image as an unbuffered binary file.

    With the default options, the image is locked until the file is closed, with the locks that QEMU
    takes.  Locks affect only programs that lock images as well.  With ``rb`` such a program can
    open the image for reading, but not for writing.  With ``r+b`` it can open the image only with
    ``force_share``, and only for reading.

    With ``r+b`` an image is checked first if it was not closed cleanly, or if its length is not a
    multiple of its cluster size.  It is refused if the check finds an error in the tables.  Leaked
    space is not an error.

    Args:
        path: The path or URL of the image.  With a URL, ``mode`` must be ``rb``.
        mode: ``rb`` to read, ``r+b`` to read and write.
        options: Backing file policy, locks, cache sizes, how URLs are read, and more; None for the
            defaults.  The option ``writable`` is ignored, because ``mode`` decides.

    Returns:
        The file, at position 0.  The caller must close it.

    Raises:
        ValueError: The mode is neither ``rb`` nor ``r+b``.
        QedError: The image or a base is damaged, or cannot be opened or locked; the backing file
            policy refuses a base; or the options contradict the mode.  Each cause has a subclass
            and an ``errno``.
    """
    if mode not in ("rb", "r+b"):
        msg = f"mode: found {mode!r}, expected 'rb' or 'r+b'"
        raise ValueError(msg)
    name = os.fsdecode(path)
    options = replace(options or OpenOptions(), writable=mode == "r+b")
    manager = open_disk(name, options, inspector=inspect_image)
    try:
        portal = Portal(manager, f"qedfuse {shown_name(name)}", before_leaving=Disk.stop_fetching)
    except OSError as error:  # no thread can be started
        raise HostError.from_os(error, shown_name(name), "open") from error
    return DiskFile(portal, mode)


class DiskFile(io.RawIOBase):
    """A disk as a seekable binary file, as `qedfuse.open` returns it.

    Reads and writes are short only at the end of the disk.  A write that begins at or past the end
    raises `NoSpaceError`, unless it is empty.  Failures of the image or the host raise a `QedError`
    with ``errno`` set.  Misuse raises the same exceptions as other file objects: `ValueError` if
    the file is closed, and `io.UnsupportedOperation` for a change of a file opened with ``rb``.

    Writes become durable with `flush` or `close`, or in the background after some seconds.  Several
    threads can share a file.  For many small reads, wrap it in an `io.BufferedReader`.

    In a child of ``os.fork`` reads, writes and `truncate` raise `RuntimeError`, and `flush` and
    `close` have no effect on the image.  The child has copies of the descriptors, and with them the
    locks: after a close in the parent, the image stays locked until the child ends or executes a
    program.  The child can open files itself, except objects of stores
    (``s3://``, ``gs://``, ``az://``) if its parent had used a store: then `open` raises
    `RemoteError`, unless the cache has the whole object.

    Each file has a thread with an event loop.  After a failure of this event loop, reads, writes
    and `truncate` raise `RuntimeError`.  So does `flush` with ``r+b``.  `close` raises the cause of
    the failure.

    An unclosed file is closed when it is garbage collected or when the program ends, with a
    `ResourceWarning`.  Errors of such a close are only logged.

    Attributes:
        name: The path or URL of the image, as given to `open`; always a ``str``.
        mode: ``rb`` or ``r+b``.
    """

    def __init__(self, portal: Portal[Disk], mode: str) -> None:
        """Wrap the disk that ``portal`` has opened in its own thread."""
        self.mode = mode
        self.name = portal.value.path
        self._portal = portal
        self._disk = portal.value
        self._position = 0
        # Held during each operation on the disk, because most of them read and change the position.
        self._lock = threading.RLock()
        _files.add(self)

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._disk.size

    def readable(self) -> bool:
        """Return True."""
        self._check_open()
        return True

    def writable(self) -> bool:
        """Return whether the file was opened for writing."""
        self._check_open()
        return self.mode == "r+b"

    def seekable(self) -> bool:
        """Return True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        self._check_open()
        return self._position

    def seek(self, offset: SupportsIndex, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, which can lie past the end, and return it.

        Raises:
            ValueError: ``whence`` is unknown, or the position would be negative.
            TypeError: ``offset`` is not an integer.
        """
        with self._exclusive():
            self._check_open()
            starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
            if whence not in starts:
                msg = f"whence: found {whence}, expected 0, 1 or 2"
                raise ValueError(msg)
            position = starts[whence] + operator.index(offset)
            if position < 0:
                msg = f"position: found {position}, expected 0 or more"
                raise ValueError(msg)
            self._position = position
            return position

    def read(self, size: SupportsIndex | None = -1, /) -> bytes:
        """Read ``size`` bytes, fewer only at the end of the disk.

        With None or a negative ``size``, read up to the end.  At or past the end, return ``b""``.
        If an error is raised, the position is unchanged.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A file cannot be read from the host or from a server.
        """
        with self._exclusive():
            self._check_open()
            start = self._position
            left = max(0, self.size - start)
            # `operator.index` makes an int of an integer of numpy, whose sums can overflow.
            length = -1 if size is None else operator.index(size)
            wanted = left if length < 0 else min(left, length)
            chunks = [bytes(chunk) for chunk in self._chunks(wanted)]
            result = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._position = start + len(result)
            return result

    def readall(self) -> bytes:
        """Read from the position to the end of the disk, with the errors of `read`."""
        return self.read()

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill ``buffer``; return the number of bytes read, fewer only at the end of the disk.

        If an error is raised, part of the buffer may have been filled, and the position is
        unchanged.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A file cannot be read from the host or from a server.
        """
        with self._exclusive(), memoryview(buffer).cast("B") as view:
            self._check_open()
            start, done = self._position, 0
            for chunk in self._chunks(len(view)):
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
            self._position = start + done
            return done

    def _chunks(self, length: int) -> Iterator[bytes | bytearray]:
        """Yield ``length`` bytes from the position on, in chunks; fewer at the end of the disk.

        The caller must hold the lock until the last chunk, and must then set the position.
        """
        start = self._position
        end = min(start + length, self.size)
        while start < end:
            chunk = self._portal.call(self._disk.read, start, min(_MAX_CALL_BYTES, end - start))
            start += len(chunk)
            yield chunk

    def write(self, data: Buffer, /) -> int:
        """Write ``data``; return the number of bytes written, fewer only at the end of the disk.

        If an error is raised, part of the data may have been written, and the position is
        unchanged.  An exception of a signal handler, such as KeyboardInterrupt, cancels the write,
        and is raised when no part of it is under way any more.

        Raises:
            NoSpaceError: The position is at or past the end, or the host is full.
            ReadOnlyError: A flush, perhaps one in the background, has failed and has made the disk
                read-only.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host's file system or kernel refused.
        """
        with self._exclusive(), memoryview(data).cast("B") as view:
            self._check_writable()
            # Read once, because a finalizer that must not wait can move the position meanwhile.
            start, done = self._position, 0
            # `Disk.write` raises for a range that begins at or past the end, and writes only the
            # first part of a range that crosses the end.  After such a part the loop ends, so the
            # caller gets the number of bytes written instead of an error.
            while done < len(view) and (not done or start + done < self.size):
                chunk = view[done : done + _MAX_CALL_BYTES]
                done += self._write_at(start + done, chunk)
            self._position = start + done
            return done

    def _write_at(self, position: int, data: memoryview) -> int:
        """Write at a position; return the number of bytes written, fewer only at the disk's end.

        In a finalizer that must not wait, the write is only started, with a copy of ``data``.
        """
        if not in_portal_thread():
            # To its end, because the caller can change or free the buffer after an interrupt.
            return self._portal.call_to_end(self._disk.write, position, data)
        # The finalizer of a buffered file writes what is in its buffer.
        self._portal.start(self._disk.write, position, bytes(data))
        return min(len(data), max(0, self.size - position)) or len(data)

    def truncate(self, size: SupportsIndex | None = None, /) -> int:
        """Grow the disk to ``size`` bytes; return the size.

        If ``size`` is None, the new size is the position.  The added range reads as zeros, and the
        position is unchanged.  An exception of a signal handler cancels the change, and is raised
        when it has ended.

        Raises:
            UsageError: The disk would shrink, or the new size is not a multiple of 512 or is more
                than the image's tables can address.
            ReadOnlyError: A flush, perhaps one in the background, has failed and has made the disk
                read-only.
            CorruptImageError: A table entry for the added range is bad, or refers to data.
            HostError: The host's file system or kernel refused.
        """
        with self._exclusive():
            self._check_writable()
            wanted = self._position if size is None else operator.index(size)
            if wanted != self.size:
                self._portal.call_to_end(self._disk.grow, wanted)
            return wanted

    def flush(self) -> None:
        """Make durable everything that has been written; do nothing if opened with ``rb``.

        Raises:
            HostError: The host reported a failure.  A failed datasync makes the disk read-only, and
                each later flush raises the error again.
            RuntimeError: The event loop of the file has failed.  `close` raises the cause.
        """
        with self._exclusive():
            self._check_open()
            if self.mode != "r+b":
                return
            if self._portal.is_alive():
                if in_portal_thread():
                    self._portal.start(self._disk.flush)
                else:
                    self._portal.call(self._disk.flush)
            else:
                # Nothing can be flushed, for one of three reasons:
                # - The portal has closed the disk, and IOBase.close() calls this method.
                # - This process is a forked child.
                # - The event loop has failed.  Only this is an error.
                self._portal.raise_failure()

    def close(self) -> None:
        """Make everything durable, mark the image as clean and release its locks.

        With ``r+b`` the image is compacted first, as its `OpenOptions` say.  With ``rb`` only the
        locks are released.  If the file is closed already, nothing is done.

        The close waits for no server.  If another thread waits for a server in a read or a write,
        that operation fails.  If the event loop of the file has failed, its error is raised.  After
        an exception of a signal handler, such as KeyboardInterrupt, the close goes on in the
        background.  Then `closed` is False, and another call waits for the end.  Without another
        call the end of the program waits, and an error is only logged.

        Raises:
            HostError: Something could not be made durable.  Even then the file is closed.  If the
                image could not be marked as clean, it will be checked when it is next opened for
                writing.
        """
        # Another thread may hold the lock while it waits for a server, so such waits are ended
        # first.
        self._portal.call_soon(self._disk.stop_fetching)
        if in_portal_thread():
            self._close_in_finalizer()
            return
        try:
            with self._lock:
                if self.closed:
                    return
                failure = self._portal.close()
                # IOBase.close calls `flush`, which refers to the failure that is raised below.
                with suppress(PortalClosedError):
                    super().close()
        except BaseException:
            # The exception of a signal handler.  The file stays open for another call, which waits
            # for the end of the close and raises its error.
            self._portal.ask_to_close()
            raise
        if failure is not None:
            raise failure

    def _close_in_finalizer(self) -> None:
        """Begin to close the file in a finalizer that must not wait.

        If another thread is using the file, the file itself is not marked as closed.
        """
        with _try_lock(self._lock) as is_locked:
            if is_locked:
                super().close()
        # After the writes and the flush that finalizers have started.
        self._portal.ask_to_close()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        """If the program has not closed the file, warn, and begin to close it."""
        if not self.closed:
            try:
                _warn(
                    f"unclosed disk {without_secrets(self.name)!r}",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            finally:  # a warning can be turned into an exception
                # Do not wait: the garbage collector may run in the portal's thread, which would
                # wait for itself.
                self._portal.ask_to_close()

    def __reduce__(self) -> NoReturn:
        """Refuse to copy or pickle the file."""
        msg = "a DiskFile cannot be copied or pickled"
        raise TypeError(msg)

    def _exclusive(self) -> AbstractContextManager[object]:
        """Return the lock, or a context that does not wait for it if the caller must not wait.

        A finalizer in a thread that portals use goes on without the lock if another thread holds
        it: that thread may wait for the thread of the finalizer.
        """
        # Python code must not take the lock for the program: the exception of a signal handler
        # could come after that, but before the block.
        return _try_lock(self._lock) if in_portal_thread() else self._lock

    def _check_open(self) -> None:
        if self.closed:
            msg = "I/O operation on closed file"
            raise ValueError(msg)

    def _check_writable(self) -> None:
        self._check_open()
        if self.mode != "r+b":
            msg = "not writable"
            raise io.UnsupportedOperation(msg)


@contextmanager
def _try_lock(lock: threading.RLock) -> Iterator[bool]:
    """Hold ``lock`` and yield True, or yield False if another thread holds it."""
    is_locked = lock.acquire(blocking=False)
    try:
        yield is_locked
    finally:
        if is_locked:
            lock.release()


_files: Final[weakref.WeakSet[DiskFile]] = weakref.WeakSet()
"""The files of this process, for `_replace_locks`."""


def _replace_locks() -> None:
    """Give each file a new lock, in a forked child.

    If another thread held a lock during the fork, the child's copy of the lock stays locked.
    """
    for file in _files:
        file._lock = threading.RLock()  # noqa: SLF001  the same module


os.register_at_fork(after_in_child=_replace_locks)
