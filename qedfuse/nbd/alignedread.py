"""The requests for a range of an export, with offsets and lengths that the server allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.nbd.requests import BlockStatus, Read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.requests import Request

_MAX_REQUEST_BYTES: Final = 1 << 20
"""Maximum length of one read request."""
_MAX_STATUS_BYTES: Final = 1 << 30
"""Maximum length of the range of one request for extents."""


class AlignedRead:
    """The read requests for a range, aligned to the minimum block of the export.

    If the range is not aligned, the requests read a larger range into a bounce buffer.

    Attributes:
        requests: The requests, in ascending order of their offsets.
    """

    def __init__(self, export: Export, offset: int, view: memoryview) -> None:
        """Make the requests.

        Args:
            export: The export to read.
            offset: Offset of the range in the export.
            view: The buffer for the range, which is as long as the range.
        """
        block = export.min_block_bytes
        step = min(_MAX_REQUEST_BYTES, export.max_payload_bytes) // block * block
        end = offset + len(view)
        aligned_start = offset // block * block
        aligned_end = -(-end // block) * block
        length = aligned_end - aligned_start
        self._target = view
        self._bounce: memoryview | None = None
        self._head_bytes = offset - aligned_start
        if (aligned_start, aligned_end) != (offset, end):
            self._bounce = memoryview(bytearray(length))
            view = self._bounce
        self.requests: Sequence[Request] = [
            Read(aligned_start + at, view[at : at + step]) for at in range(0, length, step)
        ]

    def finish(self) -> None:
        """Copy the bytes of the range from the bounce buffer, if there is one.

        The replies to all requests must have arrived.

        Raises:
            ReplyError: The server has answered a request with an error.
        """
        for request in self.requests:
            if request.failure is not None:
                raise request.failure
        if self._bounce is not None:
            self._target[:] = self._bounce[self._head_bytes : self._head_bytes + len(self._target)]


def block_status(export: Export, offset: int) -> BlockStatus:
    """Return a request for extents from the start of the minimum block in which ``offset`` lies."""
    aligned_start = offset // export.min_block_bytes * export.min_block_bytes
    return BlockStatus(aligned_start, min(_MAX_STATUS_BYTES, export.size - aligned_start))
