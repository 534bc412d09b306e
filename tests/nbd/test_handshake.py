"""The handshake without any connection: what each answer of a server leads to."""

from __future__ import annotations

import errno
from typing import Final

import pytest

from qedfuse.nbd import messages
from qedfuse.nbd.failures import BrokenError, ProtocolError, RefusedError
from qedfuse.nbd.handshake import Export, Receive, Send, handshake

GREETING: Final = messages.INIT_MAGIC + messages.OPTION_MAGIC + b"\0\3"


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return a reply to an option."""
    head = messages.OPTION_REPLY.pack(messages.OPTION_REPLY_MAGIC, option, kind, len(data))
    return head + data


def info(kind: int, *values: int) -> bytes:
    """Return the description of an export, or its block sizes."""
    form = messages.EXPORT_INFO if kind == messages.INFO_EXPORT else messages.BLOCK_INFO
    return reply(messages.OPT_GO, messages.REP_INFO, form.pack(kind, *values))


STRUCTURED: Final = reply(messages.OPT_STRUCTURED_REPLY, messages.REP_ACK)
NO_STRUCTURED: Final = reply(messages.OPT_STRUCTURED_REPLY, messages.REP_ERR_UNSUP)
CONTEXT: Final = reply(
    messages.OPT_SET_META_CONTEXT, messages.REP_META_CONTEXT, b"\0\0\0\5" + messages.ALLOCATION
) + reply(messages.OPT_SET_META_CONTEXT, messages.REP_ACK)
NO_CONTEXT: Final = reply(messages.OPT_SET_META_CONTEXT, messages.REP_ERR_UNSUP, b"no")
SIZE: Final = info(messages.INFO_EXPORT, 1 << 30, messages.FLAG_HAS_FLAGS)
GO: Final = reply(messages.OPT_GO, messages.REP_ACK)


def shake(raw: bytes, *, use_tls: bool = False) -> tuple[Export, bytes]:
    """Make a handshake with a server that sends ``raw``; return the export and what was sent.

    A server that has sent everything closes the connection, which is an EOFError here.
    """
    steps = handshake("name", use_tls=use_tls)
    sent = b""
    data: bytes | None = None
    while True:
        try:
            step = next(steps) if data is None else steps.send(data)
        except StopIteration as ended:
            assert not raw, "the server has sent more"
            export: Export = ended.value
            return export, sent
        data = None
        if isinstance(step, Send):
            sent += step.data
        elif isinstance(step, Receive):
            if len(raw) < step.length:
                raise EOFError
            data, raw = raw[: step.length], raw[step.length :]
        else:
            sent += b"<TLS>"


def test_all_that_the_server_offers_is_used() -> None:
    """Structured replies, extents, block sizes and several connections are agreed on."""
    size = info(messages.INFO_EXPORT, 1 << 30, messages.FLAG_CAN_MULTI_CONN)
    blocks = info(messages.INFO_BLOCK_SIZE, 4096, 4096, 1 << 16)
    other = reply(messages.OPT_GO, messages.REP_INFO, b"\0\1name")
    export, sent = shake(GREETING + STRUCTURED + CONTEXT + blocks + other + size + GO)
    assert export == Export(1 << 30, 4096, 1 << 16, True, True, 5)  # noqa: FBT003
    assert sent.startswith(b"\0\0\0\3" + messages.OPTION_MAGIC)
    assert sent.count(b"\0\0\0\4name") == 2


def test_a_plain_server_is_enough() -> None:
    """Without structured replies, extents and block sizes the defaults hold."""
    export, _ = shake(GREETING + NO_STRUCTURED + SIZE + GO)
    assert export == Export(1 << 30)
    export, _ = shake(GREETING + STRUCTURED + NO_CONTEXT + SIZE + GO)
    assert (export.is_structured, export.context) == (True, None)


@pytest.mark.parametrize(("size", "payload"), [(1 << 30, 512), (100, 100), (0, 1)])
def test_the_smallest_payload_of_the_protocol_is_accepted(size: int, payload: int) -> None:
    """A server may limit reads to 512 bytes, and to less only if its export is shorter."""
    described = info(messages.INFO_EXPORT, size, messages.FLAG_HAS_FLAGS)
    blocks = info(messages.INFO_BLOCK_SIZE, 1, 512, payload)
    export, _ = shake(GREETING + NO_STRUCTURED + described + blocks + GO)
    assert export == Export(size, max_payload_bytes=payload)


def test_tls_begins_before_any_name_is_sent() -> None:
    """With TLS the name of the export is sent encrypted."""
    tls = reply(messages.OPT_STARTTLS, messages.REP_ACK)
    _, sent = shake(GREETING + tls + NO_STRUCTURED + SIZE + GO, use_tls=True)
    assert b"name" not in sent.partition(b"<TLS>")[0]
    assert b"name" in sent.partition(b"<TLS>")[2]


@pytest.mark.parametrize(
    ("kind", "number", "text"),
    [
        (messages.REP_ERR_UNKNOWN, errno.ENOENT, "found no such export (gone\\x1b)"),
        (
            messages.REP_ERR_TLS_REQD,
            errno.EACCES,
            "requires TLS, expected a URL that begins with nbds",
        ),
        (messages.REP_ERR_POLICY, errno.EACCES, "found that the server refuses the option GO"),
        (messages.REP_ERR_UNSUP, errno.EOPNOTSUPP, "found a server without the option GO"),
        (messages.REP_IS_ERROR + 99, errno.EIO, "found error 99 for the option GO"),
    ],
)
def test_a_refused_export_has_a_reason(kind: int, number: int, text: str) -> None:
    """An error of the server for the export is reported on one line, with what the server says."""
    with pytest.raises(RefusedError) as caught:
        shake(GREETING + NO_STRUCTURED + reply(messages.OPT_GO, kind, b"gone\x1b"))
    assert text in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.errno == number


BAD: Final[dict[str, tuple[bytes, type[Exception]]]] = {
    "no NBD server": (b"HTTP/1.1 400 Bad R", ProtocolError),
    "old protocol": (b"NBDMAGIC\0\0\x42\2\x81\x86\x12\x53\0\0", RefusedError),
    "unknown protocol": (b"NBDMAGIC" + bytes(10), RefusedError),
    "not fixed newstyle": (GREETING[:-1] + b"\2", RefusedError),
    "reply to another option": (GREETING + GO, ProtocolError),
    "reply without magic": (GREETING + bytes(20), ProtocolError),
    "structured with data": (
        GREETING + reply(messages.OPT_STRUCTURED_REPLY, messages.REP_ACK, b"x"),
        ProtocolError,
    ),
    "huge reply": (
        GREETING
        + messages.OPTION_REPLY.pack(
            messages.OPTION_REPLY_MAGIC, messages.OPT_STRUCTURED_REPLY, 1, 1 << 31
        ),
        ProtocolError,
    ),
    "another context": (
        GREETING + STRUCTURED + CONTEXT.replace(b"base:allocation", b"qemu:allocation"),
        ProtocolError,
    ),
    "context twice": (GREETING + STRUCTURED + CONTEXT[:-20] + CONTEXT, ProtocolError),
    "shutdown": (
        GREETING + NO_STRUCTURED + reply(messages.OPT_GO, messages.REP_ERR_SHUTDOWN),
        BrokenError,
    ),
    "no size": (GREETING + NO_STRUCTURED + GO, ProtocolError),
    "short size": (
        GREETING + NO_STRUCTURED + reply(messages.OPT_GO, messages.REP_INFO, bytes(11)),
        ProtocolError,
    ),
    "no kind of information": (
        GREETING + NO_STRUCTURED + reply(messages.OPT_GO, messages.REP_INFO, b"x"),
        ProtocolError,
    ),
    "unlimited size": (
        GREETING + NO_STRUCTURED + info(messages.INFO_EXPORT, (1 << 64) - 1, 0),
        RefusedError,
    ),
    "block of 0": (
        GREETING + NO_STRUCTURED + info(messages.INFO_BLOCK_SIZE, 0, 0, 1),
        RefusedError,
    ),
    "odd block": (
        GREETING + NO_STRUCTURED + info(messages.INFO_BLOCK_SIZE, 3, 512, 1 << 20),
        RefusedError,
    ),
    "block of 128 KiB": (
        GREETING + NO_STRUCTURED + info(messages.INFO_BLOCK_SIZE, 1 << 17, 1 << 17, 1 << 20),
        RefusedError,
    ),
    "payload below a block": (
        GREETING + NO_STRUCTURED + info(messages.INFO_BLOCK_SIZE, 4096, 4096, 512),
        RefusedError,
    ),
    "payload of a byte, before the size": (
        GREETING + NO_STRUCTURED + info(messages.INFO_BLOCK_SIZE, 1, 512, 1) + SIZE,
        RefusedError,
    ),
    "payload below 512 bytes, after the size": (
        GREETING + NO_STRUCTURED + SIZE + info(messages.INFO_BLOCK_SIZE, 1, 512, 511),
        RefusedError,
    ),
    "size that is not a multiple of the block": (
        GREETING
        + NO_STRUCTURED
        + info(messages.INFO_EXPORT, 5000, 0)
        + info(messages.INFO_BLOCK_SIZE, 4096, 4096, 1 << 20),
        RefusedError,
    ),
    "endless information": (GREETING + NO_STRUCTURED + SIZE * 100, ProtocolError),
    "endless contexts": (
        GREETING
        + STRUCTURED
        + reply(messages.OPT_SET_META_CONTEXT, messages.REP_META_CONTEXT, b"\0\0\0\5x") * 100,
        ProtocolError,
    ),
    "cut": (GREETING + NO_STRUCTURED + SIZE, EOFError),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_answer_ends_the_handshake(name: str) -> None:
    """No wrong answer gives an export, and the message has one line."""
    raw, expected = BAD[name]
    with pytest.raises(expected) as caught:
        shake(raw)
    assert type(caught.value) is expected
    assert str(caught.value).isprintable()


def test_every_cut_is_noticed() -> None:
    """A connection that ends anywhere in the handshake gives no export."""
    whole = GREETING + STRUCTURED + CONTEXT + SIZE + GO
    for length in range(len(whole)):
        with pytest.raises(EOFError):
            shake(whole[:length])


def test_the_message_about_an_invalid_reply_is_true() -> None:
    """A reply of the right type with wrong data, and a context that is sent twice, are named."""
    twice = CONTEXT[: len(CONTEXT) - messages.OPTION_REPLY.size] * 2
    with pytest.raises(ProtocolError, match="found two replies with the metadata context"):
        shake(GREETING + STRUCTURED + twice)
    long = reply(messages.OPT_STRUCTURED_REPLY, messages.REP_ACK, b"xyz")
    with pytest.raises(ProtocolError, match=r"STRUCTURED_REPLY \(type 1, 3 bytes of data\)$"):
        shake(GREETING + long)
