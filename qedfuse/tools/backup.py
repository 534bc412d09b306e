"""The old content of everything that a repair changes, kept beside the image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Self

from qedfuse.errors import HostError
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from types import TracebackType


class Backup:
    """A file of old bytes: one line for each piece, its file offset and the bytes in hex.

    The file is made when there is something to save, and never written over.

    Attributes:
        path: Its name.
    """

    def __init__(self, path: str) -> None:
        """Save to ``path``, or to a name like it if that is taken."""
        self.path = path
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
            self._file.write(b"%d %s\n" % (offset, old.hex().encode()))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise HostError.from_os(error, printable(self.path), "cannot save tables") from error

    def _create(self) -> BinaryIO:
        """Make a file whose name is not taken."""
        wanted, number = self.path, 1
        while True:
            try:
                return open(self.path, "xb")  # noqa: PTH123  a name, not a Path
            except FileExistsError:
                number += 1
                self.path = f"{wanted}.{number}"
