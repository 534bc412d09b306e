"""The requests for a range of an export, with the offsets and lengths that the server allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.nbd.requests import BlockStatus, Read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.requests import Request

_MAX_REQUEST_BYTES: Final = 1 << 20
_STATUS_BYTES: Final = 1 << 30
"""Length of the range that one request asks about."""


class Parts:
    """The requests for a range, whose offsets and lengths are those that the server allows."""

    def __init__(self, export: Export, offset: int, view: memoryview) -> None:
        block = export.min_block_bytes
        step = min(_MAX_REQUEST_BYTES, export.max_payload_bytes) // block * block
        first = offset // block * block
        end = offset + len(view)
        last = -(-end // block) * block
        self._target = view
        self._whole: memoryview | None = None
        self._skip = offset - first
        if (first, last) != (offset, end):
            self._whole = memoryview(bytearray(last - first))
            view = self._whole
        self.requests: Sequence[Request] = [
            Read(first + at, view[at : at + step]) for at in range(0, last - first, step)
        ]

    def finish(self) -> None:
        """Copy what was read to where it goes, if it is not there.

        Raises:
            ReplyError: The server has answered a request with an error.
        """
        for request in self.requests:
            if request.failure is not None:
                raise request.failure
        if self._whole is not None:
            self._target[:] = self._whole[self._skip : self._skip + len(self._target)]


def block_status(export: Export, offset: int) -> BlockStatus:
    """Return a request for what a range contains; the range has the byte at ``offset``."""
    first = offset // export.min_block_bytes * export.min_block_bytes
    return BlockStatus(first, min(_STATUS_BYTES, export.size - first))
