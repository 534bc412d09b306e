"""Requests to an NBD server, and what has been received for each of them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from qedfuse.nbd import messages
from qedfuse.nbd.failures import ProtocolError

if TYPE_CHECKING:
    from qedfuse.nbd.failures import BrokenError, ReplyError

CONTEXT_BYTES: Final = 4
"""Length of the number of the context, with which a chunk of extents begins."""
EXTENT_BYTES: Final = 8
MAX_KEPT_EXTENTS: Final = 1 << 16
"""Further extents of a reply are dropped, to limit time and memory."""

_MIN_CHUNK_BYTES: Final = 512
_SPARE_CHUNKS: Final = 16
"""A reply may have this many chunks more than one for each `_MIN_CHUNK_BYTES` of data."""


class Request:
    """A request that has been sent.

    Attributes:
        command: The command.
        offset: Where the range begins in the export.
        length: Length of the range.
        is_done: Whether the reply is complete, or will never be.
        failure: Why the request failed; None if it did not.
        cookie: The number of the request on its connection.
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
        """Count a chunk of the reply.

        Raises:
            ProtocolError: The reply has more chunks than any server needs.
        """
        self._chunks_left -= 1
        if self._chunks_left < 0:
            msg = "found more chunks in a reply than any server needs"
            raise ProtocolError(msg)

    def check_complete(self) -> None:
        """Raise ProtocolError if something is missing, although the last chunk has come."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Drop what still comes, because no reader waits for it."""


class Read(Request):
    """A request for the bytes of a range.

    Attributes:
        view: Where the bytes go; None if the reader does not wait for them any more.
    """

    command = messages.CMD_READ

    def __init__(self, offset: int, view: memoryview) -> None:
        """Read into ``view``, which is not empty."""
        super().__init__(offset, len(view))
        self.view: memoryview | None = view
        self._chunks_left += len(view) // _MIN_CHUNK_BYTES
        self._starts: list[int] = []  # of what has been received, ascending and disjoint
        self._ends: list[int] = []

    def take(self, offset: int, length: int) -> None:
        """Record that a range was received.

        Raises:
            ProtocolError: The range is empty, not inside the request, or overlaps another one.
        """
        end = offset + length
        if not length or offset < self.offset or end > self.offset + self.length:
            msg = f"found data of {offset}+{length}, expected some of {self.offset}+{self.length}"
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
        """Return where bytes of the export go; None for nowhere, because no reader waits."""
        if self.view is None:
            return None
        return self.view[offset - self.offset : offset - self.offset + length]

    def abandon(self) -> None:
        """Drop what still comes; see `Request.abandon`."""
        self.view = None

    def check_complete(self) -> None:
        """Raise ProtocolError if a byte is missing and no error was reported."""
        received = sum(self._ends) - sum(self._starts)
        if self.failure is None and received != self.length:
            msg = f"found {received} bytes in a reply, expected {self.length}"
            raise ProtocolError(msg)


class BlockStatus(Request):
    """A request for what a range contains.

    Attributes:
        extents: (length, flags) of the extents from the beginning of the range.  They may end
            before its end, and the last one also past it.
    """

    command = messages.CMD_BLOCK_STATUS

    def __init__(self, offset: int, length: int) -> None:
        """Ask for a range of less than 4 GiB."""
        super().__init__(offset, length)
        self.extents: list[tuple[int, int]] = []

    def take(self, payload: bytearray, context: int | None) -> None:
        """Take the chunk with the extents.

        Raises:
            ProtocolError: The chunk is not valid, or not the first one.
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
        """Raise ProtocolError if there is no extent and no error was reported."""
        if self.failure is None and not self.extents:
            msg = "found no extent in a reply, expected one"
            raise ProtocolError(msg)
