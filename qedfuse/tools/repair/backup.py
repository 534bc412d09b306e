"""The backup of a repair: a file beside the image with the old content of all changed bytes."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import fsync_path
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

FIRST_LINE: Final = b"qedimg-check-backup 1"
LAST_LINE_KEYWORD: Final = b"complete"
"""First word of the last line, and of no other line."""
_CREATION_FAILED: Final = "cannot create the backup (repair a copy of the image elsewhere)"
"""What the message about a directory that accepts no file begins with."""


class Backup:
    """A text file with all ranges that a repair will change, written before the repair begins.

    The first line is `FIRST_LINE`.  Each of the next lines describes one range: the file offset
    in decimal, then the old bytes and the new bytes in hexadecimal.  The last line has the word
    "complete", the number of ranges, and the length of the image before and after the repair.

    An existing file is never overwritten, and a backup that is not complete is removed at the end
    of the ``with`` block.  The backup gets the owner and mode of the image, as far as permitted.

    Attributes:
        path: Path of the backup; the first call of `save` appends a number if the file exists.
        complete: Whether all ranges are saved and durable.
    """

    def __init__(self, path: str, image: os.stat_result) -> None:
        """Prepare a backup at a path.

        Args:
            path: Path of the backup; if this file exists, a number is appended.
            image: File attributes (stat(2)) of the image.
        """
        self.path = path
        self.complete = False
        self._image = image
        self._file: BinaryIO | None = None
        self._saved_ranges = 0

    def __enter__(self) -> Self:
        """Use the backup in a ``with`` block, which closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the backup, and remove it unless it is complete.

        Raises nothing, because an error from here would replace an error of the block.
        """
        if self._file is not None:
            # An error of this close is ignored, because a complete backup is durable already.
            with contextlib.suppress(OSError):
                self._file.close()
            if not self.complete:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)  # noqa: PTH108  a name, not a Path

    def save(self, offset: int, old: bytes, new: bytes) -> None:
        """Save a range that the repair will change after `finish`.

        Args:
            offset: File offset of the range.
            old: The present bytes of the range.
            new: The bytes that the repair will write, as many as ``old``.

        Raises:
            HostError: A system call failed.
        """
        if self._file is None:
            with self._host_errors(_CREATION_FAILED):
                self._file = self._create()
        with self._host_errors():
            if not self._saved_ranges:
                self._file.write(FIRST_LINE + b"\n")
            self._file.write(b"%d %s %s\n" % (offset, old.hex().encode(), new.hex().encode()))
            self._saved_ranges += 1

    def finish(self, before: int, after: int) -> None:
        """Complete the backup and make it durable; do nothing if no range was saved.

        Args:
            before: Length of the image before the repair, in bytes.
            after: Length of the image after the repair, in bytes.

        Raises:
            HostError: A system call failed.
        """
        with self._host_errors():
            if self._file is not None:
                self._file.write(
                    b"%s %d %d %d\n" % (LAST_LINE_KEYWORD, self._saved_ranges, before, after)
                )
                self._file.flush()
                os.fsync(self._file.fileno())
                directory = os.path.dirname(self.path) or "."  # noqa: PTH120  a name, not a Path
                fsync_path(directory)
                self.complete = True

    @contextlib.contextmanager
    def _host_errors(self, action: str = "cannot save tables") -> Iterator[None]:
        """Turn an OSError in the ``with`` block into a HostError; ``action`` is what failed."""
        try:
            yield
        except OSError as error:
            raise HostError.from_os(error, printable(self.path), action) from error

    def _create(self) -> BinaryIO:
        """Create a file under an unused name, with the image's owner and mode; set `path`."""
        fd, number, wanted = -1, 1, self.path
        while fd < 0:
            try:
                # 0600 until `copy_owner_and_mode` has run, because the image may be private.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(self.path, flags, 0o600)
            except FileExistsError:
                number += 1
                self.path = f"{wanted}.{number}"
        file = os.fdopen(fd, "wb")
        try:
            copy_owner_and_mode(fd, self._image)
        except OSError:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108
            raise
        return file


class BackupSize:
    """Counts the bytes of a `Backup`, before one is made.

    Attributes:
        bytes: Length of a backup with the ranges so far.
    """

    def __init__(self) -> None:
        """Count the lines of a backup without ranges; the last line is shorter than assumed."""
        self.bytes = len(FIRST_LINE) + 80

    def save(self, offset: int, old: bytes, new: bytes) -> None:
        """Count the line of a range; for the arguments see `Backup.save`."""
        self.bytes += len(f"{offset}  \n") + 2 * (len(old) + len(new))


def copy_owner_and_mode(fd: int, image: os.stat_result) -> None:
    """Give a new file the image's owner, group, and permissions to read and write.

    The owner and the group are set as far as the host permits.  If the group cannot be set, its
    permissions are left out, because they would apply to another group.

    Raises:
        OSError: The permissions cannot be set.
    """
    for uid, gid in ((image.st_uid, image.st_gid), (-1, image.st_gid)):
        # For example EPERM, or EINVAL for a user that the user namespace does not map.
        with contextlib.suppress(OSError):
            os.fchown(fd, uid, gid)
            break
    mode = image.st_mode & 0o666
    if os.fstat(fd).st_gid != image.st_gid:
        mode &= ~0o060
    os.fchmod(fd, mode)
