"""Replies of servers without any connection: the right bytes, or a protocol error."""

from __future__ import annotations

import errno
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.nbd import messages
from qedfuse.nbd.failures import ProtocolError, ReplyError
from qedfuse.nbd.replies import Replies
from qedfuse.nbd.requests import BlockStatus, Read, Request

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    Wrong: TypeAlias = dict[str, Callable[[Request], bytes]]

CONTEXT = 7
OFFSET = 1 << 20


def feed(replies: Replies, raw: bytes, sizes: Iterable[int] = ()) -> None:
    """Let replies receive bytes, at first in parts of some sizes."""
    rest = memoryview(raw)
    steps = iter(sizes)
    while rest:
        buffer = replies.buffer()
        count = min(len(buffer), len(rest), next(steps, len(rest)))
        buffer[:count] = rest[:count]
        replies.advance(count)
        rest = rest[count:]


def chunk(request: Request, kind: int, payload: bytes = b"", *, flags: int = 1) -> bytes:
    """Return a chunk of the reply to a request; by default its last one."""
    head = messages.STRUCTURED_REPLY.pack(
        messages.STRUCTURED_MAGIC, flags, kind, request.cookie, len(payload)
    )
    return head + payload


def data(request: Request, offset: int, content: bytes, *, flags: int = 1) -> bytes:
    """Return a chunk with bytes of the export."""
    payload = messages.DATA_OFFSET.pack(offset) + content
    return chunk(request, messages.REPLY_OFFSET_DATA, payload, flags=flags)


def hole(request: Request, offset: int, length: int, *, flags: int = 1) -> bytes:
    """Return a chunk for zeros."""
    payload = messages.HOLE.pack(offset, length)
    return chunk(request, messages.REPLY_OFFSET_HOLE, payload, flags=flags)


def error(request: Request, number: int, text: bytes = b"", *, rest: bytes = b"") -> bytes:
    """Return an error chunk; with an offset if ``rest`` is one."""
    kind = messages.REPLY_ERROR_OFFSET if rest else messages.REPLY_IS_ERROR + 1
    return chunk(request, kind, messages.ERROR.pack(number, len(text)) + text + rest)


def status(
    request: Request, *extents: tuple[int, int], context: int = CONTEXT, flags: int = 1
) -> bytes:
    """Return a chunk with extents."""
    payload = context.to_bytes(4, "big") + b"".join(messages.EXTENT.pack(*e) for e in extents)
    return chunk(request, messages.REPLY_BLOCK_STATUS, payload, flags=flags)


def simple(request: Request, number: int = 0) -> bytes:
    """Return the header of a simple reply."""
    return messages.SIMPLE_REPLY.pack(messages.SIMPLE_MAGIC, number, request.cookie)


def reading(length: int = 4096, *, is_structured: bool = True) -> tuple[Replies, Read, bytearray]:
    """Return replies that expect one for a read, the read, and its buffer."""
    buffer = bytearray(b"\xff" * length)
    replies, read = Replies(CONTEXT, is_structured=is_structured), Read(OFFSET, memoryview(buffer))
    replies.add(read)
    return replies, read, buffer


def asking() -> tuple[Replies, BlockStatus]:
    """Return replies that expect one with extents, and its request."""
    replies, request = Replies(CONTEXT, is_structured=True), BlockStatus(OFFSET, 1 << 20)
    replies.add(request)
    return replies, request


@given(st.randoms(use_true_random=False), st.booleans())
def test_any_order_and_division_gives_the_right_bytes(
    draw: random.Random,
    is_structured: bool,  # noqa: FBT001  drawn
) -> None:
    """Replies of concurrent reads, in any order of chunks and of parts, fill the right buffers."""
    replies = Replies(None, is_structured=is_structured)
    reads, expected, chunks = [], [], []
    for _ in range(draw.randint(1, 4)):
        length = draw.choice([1, 512, 5000, 100_000])
        buffer = bytearray(b"\xff" * length)
        read = Read(draw.randrange(1 << 40), memoryview(buffer))
        replies.add(read)
        content = bytearray(draw.randbytes(length))
        if is_structured:
            cuts = sorted({0, length, *(draw.randrange(length + 1) for _ in range(5))})
            parts = []
            for start, end in pairwise(cuts):
                if draw.random() < 0.3:
                    content[start:end] = bytes(end - start)
                    parts.append(hole(read, read.offset + start, end - start, flags=0))
                else:
                    part = bytes(content[start:end])
                    parts.append(data(read, read.offset + start, part, flags=0))
            draw.shuffle(parts)
            chunks.append([*parts, chunk(read, messages.REPLY_NONE)])
        else:
            chunks.append([simple(read) + content])
        reads.append((read, buffer))
        expected.append(content)
    raw = b""
    while chunks:
        some = draw.choice(chunks)
        raw += some.pop(0)
        chunks = [left for left in chunks if left]
    feed(replies, raw, (draw.choice([1, 7, 20, 3000, 70_000]) for _ in range(1 << 20)))
    assert {id(read) for read in replies.take_done()} == {id(read) for read, _ in reads}
    assert not replies.pending
    for (read, buffer), content in zip(reads, expected, strict=True):
        assert (read.failure, buffer) == (None, content)


BAD_READS: Final[Wrong] = {
    "unknown magic": lambda _: b"\0" * 16,
    "simple reply": simple,
    "no such request": lambda read: messages.STRUCTURED_REPLY.pack(
        messages.STRUCTURED_MAGIC, 1, messages.REPLY_NONE, read.cookie + 1, 0
    ),
    "nothing": lambda read: chunk(read, messages.REPLY_NONE),
    "a byte is missing": lambda read: data(read, OFFSET, bytes(4095)),
    "a byte too many": lambda read: data(read, OFFSET, bytes(4097)),
    "before the range": lambda read: data(read, OFFSET - 1, bytes(4096)),
    "far behind the range": lambda read: data(read, (1 << 64) - 8, bytes(16)),
    "no bytes": lambda read: data(read, OFFSET, b""),
    "no offset": lambda read: chunk(read, messages.REPLY_OFFSET_DATA, b"1234") + bytes(8),
    "twice": lambda read: data(read, OFFSET, bytes(100), flags=0) + data(read, OFFSET, bytes(4096)),
    "twice in place of the rest": lambda read: (
        data(read, OFFSET, bytes(2048), flags=0) + data(read, OFFSET, bytes(2048))
    ),
    "a hole over the beginning in place of the end": lambda read: (
        data(read, OFFSET, bytes(2048), flags=0) + hole(read, OFFSET + 100, 2048)
    ),
    "overlapping hole": lambda read: (
        data(read, OFFSET + 1000, bytes(100), flags=0) + hole(read, OFFSET, 1001)
    ),
    "hole outside": lambda read: hole(read, OFFSET, 4097),
    "empty hole": lambda read: hole(read, OFFSET, 0),
    "long hole chunk": lambda read: chunk(read, messages.REPLY_OFFSET_HOLE, bytes(13)),
    "extents": lambda read: status(read, (4096, 0)),
    "unknown chunk": lambda read: chunk(read, 9, bytes(8)),
    "none is not last": lambda read: chunk(read, messages.REPLY_NONE, flags=0),
    "error without error": lambda read: error(read, 0),
    "short error": lambda read: chunk(read, messages.REPLY_IS_ERROR + 1, bytes(5)),
    "long error": lambda read: chunk(read, messages.REPLY_IS_ERROR + 1, bytes(1 << 20)),
    "message longer than its chunk": lambda read: chunk(
        read, messages.REPLY_IS_ERROR + 1, messages.ERROR.pack(5, 100)
    ),
    "error elsewhere": lambda read: error(read, 5, rest=(OFFSET + 4096).to_bytes(8, "big")),
    "endless chunks": lambda read: b"".join(
        data(read, OFFSET + at, b"x", flags=0) for at in range(0, 4096, 2)
    ),
}


@pytest.mark.parametrize("name", BAD_READS)
def test_a_wrong_reply_to_a_read_is_a_protocol_error(name: str) -> None:
    """No wrong reply completes a read."""
    replies, read, _ = reading()
    with pytest.raises(ProtocolError):
        feed(replies, BAD_READS[name](read))
    assert not read.is_done


@pytest.mark.parametrize("length", range(messages.DATA_OFFSET.size + 1))
@pytest.mark.parametrize("rest", [b"", OFFSET.to_bytes(8, "big") + bytes(64)])
def test_data_shorter_than_their_offset_are_a_protocol_error(length: int, rest: bytes) -> None:
    """A chunk of data without a byte of data is refused by its header, whatever follows."""
    replies, read, buffer = reading()
    head = chunk(read, messages.REPLY_OFFSET_DATA, bytes(length))[: -length or None]
    with pytest.raises(ProtocolError):
        feed(replies, head + rest)
    assert not read.is_done
    assert buffer == b"\xff" * 4096


KINDS: Final = (
    *(messages.REPLY_NONE, messages.REPLY_OFFSET_DATA, messages.REPLY_OFFSET_HOLE),
    *(messages.REPLY_BLOCK_STATUS, messages.REPLY_IS_ERROR + 1, messages.REPLY_ERROR_OFFSET, 9),
)
"""Types of chunks, the last of which does not exist."""


@given(st.randoms(use_true_random=False))
def test_any_chunks_are_replies_or_a_protocol_error(draw: random.Random) -> None:
    """Chunks of any type, length and division complete a request or are a protocol error."""
    buffer = bytearray(4096)
    replies = Replies(draw.choice([CONTEXT, None]), is_structured=draw.random() < 0.9)
    requests = [Read(OFFSET, memoryview(buffer)), BlockStatus(OFFSET, 1 << 20)]
    for request in requests:
        replies.add(request)
    raw = b""
    for _ in range(draw.randrange(1, 5)):
        request = draw.choice(requests)
        begin = draw.choice([b"", CONTEXT.to_bytes(4, "big"), OFFSET.to_bytes(8, "big")])
        payload = begin + draw.choice([bytes(30), draw.randbytes(30)])[: draw.randrange(30)]
        part = chunk(request, draw.choice(KINDS), payload, flags=draw.randrange(2))
        cut = draw.choice([0, 0, 1, len(payload)])
        raw += part[: len(part) - min(cut, len(payload))]
        if draw.random() < 0.2:
            raw += simple(request, draw.randrange(3)) + draw.randbytes(draw.randrange(20))
    with suppress(ProtocolError):
        feed(replies, raw, (draw.choice([1, 7, 20, 21, 28, 64]) for _ in range(1 << 10)))
    read, status_request = requests
    assert not read.is_done or isinstance(read.failure, ReplyError)
    assert isinstance(status_request, BlockStatus)
    assert not status_request.is_done or status_request.failure or status_request.extents


BAD_STATUS: Final[Wrong] = {
    "another context": lambda request: status(request, (4096, 0), context=8),
    "twice": lambda request: status(request, (4096, 0), flags=0) + status(request, (4096, 0)),
    "empty extent": lambda request: status(request, (0, 0)),
    "extent past the end": lambda request: status(request, (1 << 20, 0), (1, 0)),
    "no extent": status,
    "half an extent": lambda request: chunk(request, messages.REPLY_BLOCK_STATUS, bytes(8)),
    "nothing": lambda request: chunk(request, messages.REPLY_NONE),
    "data": lambda request: data(request, OFFSET, bytes(512)),
    "hole": lambda request: hole(request, OFFSET, 512),
    "gigabytes": lambda request: messages.STRUCTURED_REPLY.pack(
        messages.STRUCTURED_MAGIC, 1, messages.REPLY_BLOCK_STATUS, request.cookie, (1 << 32) - 4
    ),
}


@pytest.mark.parametrize("name", BAD_STATUS)
def test_wrong_extents_are_a_protocol_error(name: str) -> None:
    """No wrong reply completes a question about extents."""
    replies, request = asking()
    with pytest.raises(ProtocolError):
        feed(replies, BAD_STATUS[name](request))
    assert not request.is_done


def test_extents_are_those_of_the_server() -> None:
    """Extents come in order, and the last one may pass the end of the range."""
    replies, request = asking()
    feed(replies, status(request, (4096, 3), (1 << 30, 0)), [3, 5, 21])
    assert replies.take_done() == [request]
    assert request.extents == [(4096, 3), (1 << 30, 0)]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(5, errno.EIO), (1, errno.EPERM), (12, errno.ENOMEM), (999, errno.EINVAL)],
)
@pytest.mark.parametrize("form", ["error", "error at an offset", "simple"])
def test_an_error_of_the_server_is_that_of_the_read(form: str, number: int, expected: int) -> None:
    """A read that the server cannot serve has the errno of the server, and its text on one line."""
    replies, read, _ = reading(is_structured=form != "simple")
    if form == "simple":
        feed(replies, simple(read, number))
    else:
        rest = OFFSET.to_bytes(8, "big") if form == "error at an offset" else b""
        feed(replies, error(read, number, b"bad\nsector", rest=rest), [1] * 10)
    assert replies.take_done() == [read]
    assert isinstance(read.failure, ReplyError)
    assert read.failure.errno == expected
    assert read.failure.text == ("" if form == "simple" else "bad\\nsector")


def test_what_comes_for_an_abandoned_read_is_dropped() -> None:
    """After a reader has gone, in the middle of its data too, its buffer is not written to."""
    replies, read, buffer = reading(200_000)
    raw = data(read, OFFSET, b"x" * 200_000)
    feed(replies, raw[:100_000])
    read.abandon()
    before = bytes(buffer)
    assert b"x" in before
    feed(replies, raw[100_000:])
    assert buffer == before
    assert replies.take_done() == [read]


@given(st.binary(max_size=200))
def test_any_bytes_complete_no_read(raw: bytes) -> None:
    """Bytes that were not made for a read are an error, or the beginning of something."""
    replies, read, _ = reading()
    with suppress(ProtocolError):
        feed(replies, raw)
    assert not read.is_done or isinstance(read.failure, ReplyError)
