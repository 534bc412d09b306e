"""The old content of everything that a repair changes, kept beside the image."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from qedfuse.errors import HostError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

FIRST: Final = b"qedimg-check-backup 1"
LAST: Final = b"complete"


class Backup:
    """A text file of old bytes: all that a repair is going to change, before it begins.

    The first line is `FIRST`.  Each line after it is one piece: its file offset, its bytes
    as they were, and as they are to be, in hex.  The last line is "complete", with the
    number of pieces, and the image's length before and after the repair.

    The file is made when there is something to save, and never written over; one that is
    not complete is removed.  Only who may read the image may read it.

    Attributes:
        path: Its name.
        complete: Whether everything is saved, and durable.
    """

    def __init__(self, path: str, image: os.stat_result) -> None:
        """Save to ``path``, or to a name like it if that is taken; ``image`` is the image's."""
        self.path = path
        self.complete = False
        self._image = image
        self._file: BinaryIO | None = None
        self._pieces = 0

    def __enter__(self) -> Self:
        """Use the backup in a ``with`` block, which closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file, and remove it unless it is complete."""
        if self._file is not None:
            # What is still buffered is not worth an error now.
            with contextlib.suppress(OSError):
                self._file.close()
            if not self.complete:
                os.unlink(self.path)  # noqa: PTH108  a name, not a Path

    def save(self, offset: int, old: bytes, new: bytes) -> None:
        """Save bytes that are going to be changed.

        Raises:
            HostError: They cannot be saved.
        """
        with self._told():
            if self._file is None:
                self._file = self._create()
                self._file.write(FIRST + b"\n")
            self._file.write(b"%d %s %s\n" % (offset, old.hex().encode(), new.hex().encode()))
            self._pieces += 1

    def finish(self, before: int, after: int) -> None:
        """Make the file durable, with its name; the lengths are the image's, in bytes.

        Raises:
            HostError: It cannot be made so.
        """
        with self._told():
            if self._file is not None:
                self._file.write(b"%s %d %d %d\n" % (LAST, self._pieces, before, after))
                self._file.flush()
                os.fsync(self._file.fileno())
                sync_directory(self.path)
                self.complete = True

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what could not be done."""
        try:
            yield
        except OSError as error:
            raise HostError.from_os(error, printable(self.path), "cannot save tables") from error

    def _create(self) -> BinaryIO:
        """Make a file whose name is not taken, with the image's owner and mode."""
        fd, number, wanted = -1, 1, self.path
        while fd < 0:
            try:
                # Nobody else can open it before it has its owner and its mode.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(self.path, flags, 0o600)
            except FileExistsError:
                number += 1
                self.path = f"{wanted}.{number}"
        file = os.fdopen(fd, "wb")
        try:
            like(fd, self._image)
        except OSError:
            file.close()
            os.unlink(self.path)  # noqa: PTH108
            raise
        return file


def like(fd: int, image: os.stat_result) -> None:
    """Give a new file the image's owner, if that is allowed, and its mode.

    A group or an owner that it cannot have gets no access by their bits either, since
    these would then be somebody else's.
    """
    for uid, gid in ((image.st_uid, image.st_gid), (-1, image.st_gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(fd, uid, gid)
            break
    mode = image.st_mode & 0o666
    if os.fstat(fd).st_gid != image.st_gid:
        mode &= ~0o060
    os.fchmod(fd, mode)


def sync_directory(path: str) -> None:
    """Make the name of a new file durable."""
    directory = os.path.dirname(path) or "."  # noqa: PTH120  a name, not a Path
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
