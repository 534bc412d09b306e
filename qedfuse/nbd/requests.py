"""Requests to an NBD server, and what has been received for each request."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from qedfuse.nbd import messages
from qedfuse.nbd.failures import ProtocolError

if TYPE_CHECKING:
    from qedfuse.nbd.failures import BrokenError, ReplyError

CONTEXT_BYTES: Final = 4
"""Length of the metadata context's ID, with which a chunk of extents begins."""
EXTENT_BYTES: Final = 8
"""Length of one extent in a chunk of extents."""
MAX_KEPT_EXTENTS: Final = 1 << 16
"""Maximum number of extents that are kept of a reply, to limit time and memory."""

_MIN_CHUNK_BYTES: Final = 512
_SPARE_CHUNKS: Final = 16
"""Number of chunks that a reply may have in addition to one for each `_MIN_CHUNK_BYTES` of data."""


class Request:
    """A request for a range of an export, and the state of its reply.

    Attributes:
        command: The command.
        offset: Where the range begins in the export.
        length: Length of the range.
        is_done: Whether the reply is complete, or cannot be completed any more.
        failure: Why the request failed; None if it has not failed.
        cookie: The number of the request on its connection; 0 until the request is sent.
    """

    command: int

    def __init__(self, offset: int, length: int) -> None:
        """Describe a request for a range that is not empty."""
        self.offset = offset
        self.length = length
        self.is_done = False
        self.failure: ReplyError | BrokenError | None = None
        self.cookie = 0
        self._chunks_left = _SPARE_CHUNKS

    def count_chunk(self) -> None:
        """Count a chunk; raise ProtocolError if the reply has more than any server needs."""
        self._chunks_left -= 1
        if self._chunks_left < 0:
            msg = "found more chunks in a reply than any server needs"
            raise ProtocolError(msg)

    def check_complete(self) -> None:
        """Raise ProtocolError if a part of the reply is missing after its last chunk."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Record that no reader waits for the reply any more, so its bytes need not be stored."""


class Read(Request):
    """A request for the bytes of a range.

    Attributes:
        view: Buffer for the bytes; None if the reader does not wait for them any more.
    """

    command = messages.CMD_READ

    def __init__(self, offset: int, view: memoryview) -> None:
        """Describe a read into ``view``, which is not empty."""
        super().__init__(offset, len(view))
        self.view: memoryview | None = view
        self._chunks_left += len(view) // _MIN_CHUNK_BYTES
        self._starts: list[int] = []  # of the received ranges, ascending and disjoint
        self._ends: list[int] = []

    def record(self, offset: int, length: int) -> None:
        """Record that a range was received.

        Raises:
            ProtocolError: The range is empty, outside the request, or was received before.
        """
        end = offset + length
        if length <= 0 or offset < self.offset or end > self.offset + self.length:
            msg = f"found data of {offset}+{length}, expected a part of {self.offset}+{self.length}"
            raise ProtocolError(msg)
        starts, ends = self._starts, self._ends
        after = bisect_left(starts, offset)
        if (after and ends[after - 1] > offset) or (after < len(starts) and starts[after] < end):
            msg = f"found data of {offset}+{length} twice"
            raise ProtocolError(msg)
        if after and ends[after - 1] == offset:
            ends[after - 1] = end
        else:
            starts.insert(after, offset)
            ends.insert(after, end)

    def destination(self, offset: int, length: int) -> memoryview | None:
        """Return the part of the view for bytes of the export; None if no reader waits for them."""
        if self.view is None:
            return None
        return self.view[offset - self.offset : offset - self.offset + length]

    def abandon(self) -> None:
        """Drop the bytes that still come; see `Request.abandon`."""
        self.view = None

    def check_complete(self) -> None:
        """Raise ProtocolError if a byte is missing although the server reported no error."""
        received = sum(self._ends) - sum(self._starts)
        if self.failure is None and received != self.length:
            msg = f"found {received} bytes in a reply, expected {self.length}"
            raise ProtocolError(msg)


class BlockStatus(Request):
    """A request for the extents of a range.

    Attributes:
        extents: (length, flags) of each extent, the first one at the beginning of the range.  The
            last one may end before or past the end of the range.
    """

    command = messages.CMD_BLOCK_STATUS

    def __init__(self, offset: int, length: int) -> None:
        """Describe a request for the extents of a range of less than 4 GiB."""
        super().__init__(offset, length)
        self.extents: list[tuple[int, int]] = []

    def record(self, payload: bytearray, context: int | None) -> None:
        """Record the extents in a chunk.

        Raises:
            ProtocolError: The chunk is not valid, or is not the first chunk with extents.
        """
        if self.extents or int.from_bytes(payload[:CONTEXT_BYTES], "big") != context:
            msg = "found block status that was not asked for"
            raise ProtocolError(msg)
        end = CONTEXT_BYTES + MAX_KEPT_EXTENTS * EXTENT_BYTES
        left = self.length
        for length, flags in messages.EXTENT.iter_unpack(payload[CONTEXT_BYTES:end]):
            if not length or left <= 0:
                msg = "found an extent that is empty, or begins past the end of the request"
                raise ProtocolError(msg)
            self.extents.append((length, flags))
            left -= length

    def check_complete(self) -> None:
        """Raise ProtocolError if there is no extent although the server reported no error."""
        if self.failure is None and not self.extents:
            msg = "found a reply without extents"
            raise ProtocolError(msg)
