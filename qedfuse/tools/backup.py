"""The old content of everything that a repair changes, kept beside the image."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, BinaryIO, Self

from qedfuse.errors import HostError
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from types import TracebackType


class Backup:
    """A file of old bytes: one line for each piece, its file offset and the bytes in hex.

    The file is made when there is something to save, and never written over.  Only who may
    read the image may read it.

    Attributes:
        path: Its name.
    """

    def __init__(self, path: str, image: os.stat_result) -> None:
        """Save to ``path``, or to a name like it if that is taken; ``image`` is the image's."""
        self.path = path
        self._image = image
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Use the backup in a ``with`` block, which closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()

    @property
    def used(self) -> bool:
        """Whether anything was saved."""
        return self._file is not None

    def save(self, offset: int, old: bytes) -> None:
        """Save bytes that are about to be changed; they are durable when this returns.

        Raises:
            HostError: They cannot be saved.
        """
        try:
            if self._file is None:
                self._file = self._create()
                sync_directory(self.path)
            self._file.write(b"%d %s\n" % (offset, old.hex().encode()))
            self._file.flush()
            os.fsync(self._file.fileno())
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
