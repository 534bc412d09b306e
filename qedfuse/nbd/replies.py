"""Parsing the replies of an NBD server, without any I/O.

Every field is checked before it is used.  After `ProtocolError`, the caller must close the
connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.nbd import messages
from qedfuse.nbd.failures import ProtocolError, ReplyError
from qedfuse.nbd.requests import CONTEXT_BYTES, EXTENT_BYTES, BlockStatus, Read

if TYPE_CHECKING:
    from qedfuse.nbd.failures import BrokenError
    from qedfuse.nbd.requests import Request

_SCRATCH_BYTES: Final = 64 << 10
_MAX_COPIED_BYTES: Final = 16 << 10
"""If more bytes of a payload are missing, they are received directly into their destination."""
_MAX_EXTENTS: Final = 1 << 20
"""Maximum number of extents in a reply, as the protocol recommends."""
_MAX_ERROR_BYTES: Final = 2 * messages.MAX_STRING_BYTES
"""Maximum length of an error chunk; its message needs at most half of this length."""


class Replies:
    """Divides the bytes that a server sends into replies.

    The connection receives bytes into the view that `buffer` returns, and then calls `advance`.

    Attributes:
        pending: The requests that wait for their replies, by their cookies.
    """

    def __init__(self, context: int | None, *, is_structured: bool) -> None:
        """Expect the kind of replies that was negotiated; the arguments are those of `Export`."""
        self.pending: dict[int, Request] = {}
        self._done: list[Request] = []
        self._context = context
        self._is_structured = is_structured
        self._cookie = 0
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0  # the range of the scratch buffer that is not parsed yet
        self._chunk: _Chunk | None = None  # the chunk whose payload is being received
        self._is_direct = False  # whether the last `buffer` was the destination of a payload

    def add(self, request: Request) -> bytes:
        """Expect the reply to a request; return the message to send."""
        self._cookie += 1
        request.cookie = self._cookie
        self.pending[self._cookie] = request
        return messages.request(request.command, self._cookie, request.offset, request.length)

    def take_done(self) -> list[Request]:
        """Return the requests that have ended since the last call."""
        done, self._done = self._done, []
        return done

    def fail(self, failure: BrokenError) -> None:
        """End all pending requests with ``failure``, because no further byte will come."""
        for request in self.pending.values():
            request.failure = failure
            request.is_done = True
            self._done.append(request)
        self.pending.clear()

    def buffer(self) -> memoryview:
        """Return a view of at least one byte, for the bytes that come next."""
        chunk = self._chunk
        if chunk is not None and chunk.left > _MAX_COPIED_BYTES:
            view = chunk.destination(chunk.left)
            if view is not None:
                self._is_direct = True
                return view
        self._is_direct = False
        count = self._end - self._start
        self._scratch[:count] = self._scratch[self._start : self._end]
        self._start, self._end = 0, count
        return self._scratch[count:]

    def advance(self, count: int) -> None:
        """Parse ``count`` bytes, at least one, that were received into the last `buffer`.

        Raises:
            ProtocolError: The protocol does not allow the bytes.
        """
        if self._is_direct:
            self._count_received(count)
            return
        self._end += count
        while self._start < self._end:
            if self._chunk is not None:
                count = min(self._chunk.left, self._end - self._start)
                self._chunk.put(self._scratch[self._start : self._start + count])
                self._start += count
                self._count_received(count)
            elif not self._parse_header():
                return

    def _count_received(self, count: int) -> None:
        """Count ``count`` received bytes of the payload; end the chunk after its last byte."""
        chunk = self._chunk
        assert chunk is not None  # noqa: S101  the callers have a chunk
        chunk.at += count
        chunk.left -= count
        if not chunk.left:
            self._chunk = None
            self._end_chunk(chunk)

    def _parse_header(self) -> bool:
        """Parse a header, and the offset before data; return False if some bytes are missing."""
        available = self._end - self._start
        if available < messages.SIMPLE_REPLY.size:
            return False
        magic, error, cookie = messages.SIMPLE_REPLY.unpack_from(self._scratch, self._start)
        if magic == messages.SIMPLE_MAGIC:
            self._start += messages.SIMPLE_REPLY.size
            self._begin_simple(self._find(cookie), error)
            return True
        if magic != messages.STRUCTURED_MAGIC or not self._is_structured:
            msg = f"found {magic:#010x} where a reply begins"
            raise ProtocolError(msg)
        if available < messages.STRUCTURED_REPLY.size:
            return False
        _, flags, kind, cookie, length = messages.STRUCTURED_REPLY.unpack_from(
            self._scratch, self._start
        )
        request = self._find(cookie)
        is_last = bool(flags & messages.REPLY_FLAG_DONE)
        _check_chunk(request, kind, length, is_last=is_last)
        fixed = messages.DATA_OFFSET.size if kind == messages.REPLY_OFFSET_DATA else 0
        if available < messages.STRUCTURED_REPLY.size + fixed:
            return False
        self._start += messages.STRUCTURED_REPLY.size
        request.count_chunk()
        if fixed:
            (offset,) = messages.DATA_OFFSET.unpack_from(self._scratch, self._start)
            self._start += fixed
            self._begin_data(request, offset, length - fixed, is_last=is_last)
            return True
        chunk = _Chunk(request, kind, length, bytearray(length), is_last=is_last)
        if length:
            self._chunk = chunk
        else:
            self._end_chunk(chunk)
        return True

    def _find(self, cookie: int) -> Request:
        """Return the request of a reply, by its cookie."""
        request = self.pending.get(cookie)
        if request is None:
            msg = "found a reply to no request"
            raise ProtocolError(msg)
        return request

    def _begin_simple(self, request: Request, error: int) -> None:
        """Begin to receive a simple reply, whose header was parsed."""
        if error:
            request.failure = ReplyError(messages.host_errno(error), "")
            self._finish(request)
        elif self._is_structured:
            msg = "found a simple reply, expected a structured one"
            raise ProtocolError(msg)
        else:
            self._begin_data(request, request.offset, request.length, is_last=True)

    def _begin_data(self, request: Request, offset: int, length: int, *, is_last: bool) -> None:
        """Begin to receive bytes of the export."""
        if not isinstance(request, Read):
            msg = "found data that were not asked for"
            raise ProtocolError(msg)
        request.record(offset, length)
        at = offset - request.offset
        self._chunk = _Chunk(
            request, messages.REPLY_OFFSET_DATA, length, None, is_last=is_last, at=at
        )

    def _end_chunk(self, chunk: _Chunk) -> None:
        """Process a chunk whose payload is complete."""
        request, payload = chunk.request, chunk.payload
        if payload is None or chunk.kind == messages.REPLY_NONE:
            pass
        elif chunk.kind & messages.REPLY_IS_ERROR:
            failure = _parse_error(request, chunk.kind, payload)
            request.failure = request.failure or failure
        elif isinstance(request, Read):
            offset, length = messages.HOLE.unpack(payload)
            request.record(offset, length)
            view = request.destination(offset, length)
            if view is not None:
                view[:] = bytes(length)
        elif isinstance(request, BlockStatus):
            request.record(payload, self._context)
        if chunk.is_last:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        """End a request after the last byte of its reply."""
        request.check_complete()
        del self.pending[request.cookie]
        request.is_done = True
        self._done.append(request)


class _Chunk:
    """A chunk of a reply whose payload is being received.

    Attributes:
        request: The request.
        kind: The type of the chunk.
        payload: Buffer for the payload; None for data, which goes into the view of the reader.
        at: Offset of the next byte in ``payload``; without ``payload``, in the request's range.
        left: Number of bytes of the payload that are missing.
        is_last: Whether the chunk is the last of the reply.
    """

    __slots__ = ("at", "is_last", "kind", "left", "payload", "request")

    def __init__(
        self,
        request: Request,
        kind: int,
        length: int,
        payload: bytearray | None,
        *,
        is_last: bool,
        at: int = 0,
    ) -> None:
        self.request = request
        self.kind = kind
        self.payload = payload
        self.at = at
        self.left = length
        self.is_last = is_last

    def destination(self, count: int) -> memoryview | None:
        """Return the buffer for the next ``count`` bytes; None if no reader waits for them."""
        if self.payload is not None:
            return memoryview(self.payload)[self.at : self.at + count]
        assert isinstance(self.request, Read)  # noqa: S101  see `Replies._begin_data`
        return self.request.destination(self.request.offset + self.at, count)

    def put(self, data: memoryview) -> None:
        """Store the next bytes, or drop them if no reader waits for them."""
        view = self.destination(len(data))
        if view is not None:
            view[:] = data


def _check_chunk(request: Request, kind: int, length: int, *, is_last: bool) -> None:
    """Raise ProtocolError if a request does not allow a chunk with this type and length."""
    if kind == messages.REPLY_NONE:
        is_valid = is_last and not length
    elif kind == messages.REPLY_OFFSET_DATA:
        is_valid = isinstance(request, Read) and length > messages.DATA_OFFSET.size
    elif kind & messages.REPLY_IS_ERROR:
        is_valid = messages.ERROR.size <= length <= _MAX_ERROR_BYTES
    elif kind == messages.REPLY_OFFSET_HOLE:
        is_valid = isinstance(request, Read) and length == messages.HOLE.size
    elif kind == messages.REPLY_BLOCK_STATUS:
        extents, rest = divmod(length - CONTEXT_BYTES, EXTENT_BYTES)
        is_valid = isinstance(request, BlockStatus) and not rest and 0 < extents <= _MAX_EXTENTS
    else:
        is_valid = False
    if not is_valid:
        msg = f"found a chunk of type {kind} with {length} bytes, which the request does not allow"
        raise ProtocolError(msg)


def _parse_error(request: Request, kind: int, payload: bytearray) -> ReplyError:
    """Return the error of an error chunk, which must not contradict itself or the request."""
    error, length = messages.ERROR.unpack_from(payload)
    end = messages.ERROR.size + length
    rest = len(payload) - end
    is_offset = kind == messages.REPLY_ERROR_OFFSET
    if not error or rest < (messages.DATA_OFFSET.size if is_offset else 0):
        msg = "found an error chunk that contradicts itself"
        raise ProtocolError(msg)
    if is_offset:
        (offset,) = messages.DATA_OFFSET.unpack_from(payload, end)
        if not request.offset <= offset < request.offset + request.length:
            msg = f"found an error at {offset}, expected one in {request.offset}+{request.length}"
            raise ProtocolError(msg)
    text = messages.server_text(bytes(payload[messages.ERROR.size : end]))
    return ReplyError(messages.host_errno(error), text)
