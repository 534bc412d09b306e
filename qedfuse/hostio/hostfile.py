"""Two interfaces: `ReadableFile` for any file of a chain, and `HostFile` for the file of an image.

`qedfuse.hostio.posixfile.PosixFile` implements both with system calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from qedfuse.hostio.pagesource import PageSource, WriteTarget
    from qedfuse.hostio.readpolicy import ReadPolicy

Buffer: TypeAlias = bytes | bytearray | memoryview

FileIdentity: TypeAlias = tuple[object, ...]
"""A value that is equal for two open files if they are the same file, such as device and inode."""


class ReadableFile(Protocol):
    """A file that is open for reading.  Offsets and lengths are in bytes.

    If a read fails, a ``try_`` method returns False.  Other methods raise `HostError`, unless
    their docstrings say otherwise.

    Attributes:
        path: The file's name as it was given: by the user, or by the image that names the file.
        name: The file's name in messages, as printable text.
    """

    path: str
    name: str

    @property
    def identity(self) -> FileIdentity:
        """A value that is equal for two open files if they are the same file."""

    @property
    def read_policy(self) -> ReadPolicy | None:
        """The policy that decides whether `try_read` tries a read; None without a policy."""

    @property
    def page_source(self) -> PageSource | None:
        """What the mount's C extension needs to read the file; None if the extension must not."""

    @property
    def write_target(self) -> WriteTarget | None:
        """What the mount's C extension needs to write the file; None if the extension must not."""

    def fileno(self) -> int:
        """Return the descriptor of the file; -1 if no descriptor gives access to its bytes."""

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes at a file offset; fewer only where the file ends."""

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.
        """

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.  The call
        blocks the thread; several worker threads may call it concurrently.
        """

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from a file offset without blocking; return whether that succeeded.

        Returns False if the read would block or fail, or if the file ends before the view is full.
        After False the content of ``view`` is undefined.
        """

    def try_start_read(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read in a thread that then answers a request; return whether it was started.

        The thread answers by a C function, without the event loop.  Returns False if `read_policy`
        demands that `try_read` looks for the range in the page cache first, and if that was not the
        last call.

        Args:
            offset: File offset.
            view: The buffer, which the caller must neither use nor resize before the C function has
                returned.
            take_answer: Called just before the read is started.  Returns a capsule with the C
                function that the thread calls at the end of the read (see ``_iothreads.c``).
            ended: Called once in the event loop after the end of a started read, with the number of
                bytes read or a negative errno.  The C function may still be running.

        Raises:
            OSError: No thread exists, and none could be created.  ``ended`` is not called.
        """

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if no data follows."""

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins; the file's end counts as one.

        Returns None if ``offset`` is not within the file.
        """

    def size(self) -> int:
        """Return the file's length in bytes."""

    def stat(self) -> os.stat_result:
        """Return the file's attributes (fstat(2)).

        Reading the times slows down later changes of the file; see
        `qedfuse.hostio.systemcalls.size_and_blocks`.

        Raises:
            HostError: A system call failed.
        """

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system that holds the file (statvfs(3)).

        Raises:
            HostError: A system call failed.
        """

    def stop_fetching(self) -> None:
        """Make each present or later read fail if it must wait for a server; other reads go on."""

    def close(self) -> None:
        """Close the file and release every lock taken through it; a second call does nothing."""


class HostFile(ReadableFile, Protocol):
    """The file of an image, open for reading or for writing.  Offsets and lengths are in bytes.

    If the host refuses, a ``try_`` method returns False, and other methods raise `HostError`
    (`NoSpaceError` for a full file system), unless the docstring says otherwise.  Nothing is
    certain to be durable before `datasync` has returned, or `try_datasync` has returned True.

    Attributes:
        writable: Whether the file is open for writing.
        can_punch: Whether `punch` tries to punch holes; False if the file cannot be changed, and
            once the host has refused.
    """

    writable: bool
    can_punch: bool

    def can_write_inline(self, length: int) -> bool:
        """Return whether `try_write` would try to write ``length`` bytes now."""

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` at a file offset without blocking; return whether that succeeded.

        Returns False if the write would block or fail.  After False a part of ``data`` may have
        been written, and the caller must write all of ``data`` with `pwrite`.
        """

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write ``parts`` one after another, beginning at a file offset.

        After an error, some of the bytes may have been written.
        """

    def try_datasync(self) -> bool:
        """Make all earlier writes and the file's length durable, if that takes little time.

        Returns False, having done nothing, if the caller must call `datasync`.  Raises HostError if
        a system call failed.
        """

    async def datasync(self) -> None:
        """Make all earlier writes and the file's length durable."""

    def try_grow(self, size: int) -> bool:
        """Make the file ``size`` bytes long without blocking; return whether that succeeded.

        ``size`` must not be less than the file's length.  After False the file is unchanged.
        """

    async def truncate(self, size: int) -> None:
        """Make the file ``size`` bytes long; added bytes read as zeros."""

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Give the space of ``ranges`` back to the host; each range is an offset and a length.

        The ranges read as zeros afterwards.  If the host cannot punch holes, nothing changes, and
        ``can_punch`` becomes False.
        """

    async def reserve(self, offset: int, length: int) -> None:
        """Reserve space for later writes to a range inside the file, if the host can do so."""

    def stored_blocks(self) -> int:
        """Return the file's ``st_blocks``, in units of 512 bytes."""

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the file's times of access and modification, in nanoseconds since 1970 (UTC).

        Raises:
            OSError: The file belongs to another user, or a system call failed.
        """
