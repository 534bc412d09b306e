"""Replies of an NBD server: bytes only in the ranges that were asked for, or a protocol error.

An input begins with one byte: whether replies are structured, and in how small parts they arrive.
Then one byte gives the number of requests, and two bytes each their kinds and lengths; the rest is
what the server sends.
"""

from __future__ import annotations

from typing import Final

from qedfuse.nbd import messages
from qedfuse.nbd.failures import ProtocolError
from qedfuse.nbd.replies import Replies
from qedfuse.nbd.requests import BlockStatus, Read, Request
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.target import Target, assert_line
from tests.nbd.test_replies import chunk, data, error, hole, simple, status

_CONTEXT: Final = 7
_OFFSET: Final = 1 << 20
_GUARD: Final = b"\xee" * 64
"""Bytes before and after the buffer of each read, which nothing may change."""
_LENGTHS: Final = (1, 512, 4096, 20_000, 70_000)
_PARTS: Final = (1 << 20, 1, 7, 1000)


def _requests(drawn: Drawn) -> list[tuple[Request, bytearray]]:
    """Return requests, each with the buffer of its read and the guards around it."""
    made: list[tuple[Request, bytearray]] = []
    for number in range(1 + drawn.number() % 3):
        kind, length = drawn.number() % 4, drawn.choice(_LENGTHS)
        offset = _OFFSET * (number + 1)
        if kind:
            whole = bytearray(_GUARD + bytes(length) + _GUARD)
            view = memoryview(whole)[len(_GUARD) : len(_GUARD) + length]
            read = Read(offset, view)
            made.append((read, whole))
            if kind > 2:
                read.abandon()
        else:
            made.append((BlockStatus(offset, length), bytearray()))
    return made


def check(data: bytes) -> None:
    """Let a server answer requests with the bytes of an input."""
    drawn = Drawn(data)
    flags = drawn.number()
    replies = Replies(_CONTEXT, is_structured=bool(flags & 1))
    requests = _requests(drawn)
    for request, _ in requests:
        replies.add(request)
    rest = memoryview(drawn.rest())
    part = _PARTS[flags >> 1 & 3]
    try:
        while rest and replies.pending:
            buffer = replies.buffer()
            count = min(len(buffer), len(rest), part)
            assert count > 0
            buffer[:count] = rest[:count]
            replies.advance(count)
            rest = rest[count:]
    except ProtocolError as failure:
        assert_line(failure)
        replies.fail(failure)
    done = replies.take_done()
    assert len(set(done)) == len(done), "a request has ended twice"
    for request, whole in requests:
        assert whole[: len(_GUARD)] in (_GUARD, b"")
        assert whole[-len(_GUARD) :] in (_GUARD, b""), "bytes outside of a buffer"
        assert request.is_done == (request in done)
        if request.is_done and request.failure is None and isinstance(request, BlockStatus):
            assert request.extents
            assert all(0 < length < 1 << 32 for length, _ in request.extents)


def seeds() -> list[bytes]:
    """Return valid replies of each kind to one or two requests."""
    read, other = Read(_OFFSET, memoryview(bytearray(512))), BlockStatus(_OFFSET, 4096)
    read.cookie = other.cookie = 1
    one_read, one_status = b"\0\1\1", b"\0\0\2"
    content = bytes(range(1, 129)) * 4
    return [
        b"\1" + one_read + data(read, _OFFSET, content),
        b"\3" + one_read
        + data(read, _OFFSET, content[:100], flags=0) + hole(read, _OFFSET + 100, 412),
        b"\1" + one_read + error(read, 5, b"no"),
        b"\1" + one_read + error(read, 5, b"no", rest=_OFFSET.to_bytes(8, "big")),
        b"\0" + one_read + simple(read) + content,
        b"\0" + one_read + simple(read, 5),
        b"\1" + one_status + status(other, (1024, 0), (3072, 3), context=_CONTEXT),
        b"\1" + one_status + chunk(other, messages.REPLY_NONE),
    ]  # fmt: skip


TARGET: Final = Target(
    check,
    seeds,
    (
        messages.STRUCTURED_MAGIC.to_bytes(4, "big"),
        messages.SIMPLE_MAGIC.to_bytes(4, "big"),
        _OFFSET.to_bytes(8, "big"),
        (1).to_bytes(8, "big"),
    ),
)
