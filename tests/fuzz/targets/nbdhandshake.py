"""The handshake with an NBD server: an export within the limits of the protocol, or an error."""

from __future__ import annotations

from typing import Final

from qedfuse.nbd import messages
from qedfuse.nbd.failures import BrokenError, RefusedError
from qedfuse.nbd.handshake import Export, Receive, Send, handshake
from tests.fuzz.targets.target import Target, assert_line
from tests.nbd.test_handshake import CONTEXT, GO, GREETING, NO_STRUCTURED, SIZE, STRUCTURED, info

_MAX_RECEIVE_BYTES: Final = 64 << 10
_MAX_SENT_BYTES: Final = 4096


def check(data: bytes) -> None:
    """Make a handshake with a server that sends the bytes of an input and then closes.

    The first byte of the input selects TLS, whose bytes are not sent.
    """
    steps = handshake("name", use_tls=bool(data[:1]) and data[0] % 2 == 1)
    rest, answer, sent = data[1:], b"", 0
    try:
        step = next(steps)
        while True:
            answer = b""
            if isinstance(step, Send):
                sent += len(step.data)
            elif isinstance(step, Receive):
                assert 0 < step.length <= _MAX_RECEIVE_BYTES
                if len(rest) < step.length:
                    return
                answer, rest = rest[: step.length], rest[step.length :]
            step = steps.send(answer)
    except StopIteration as ended:
        export: Export = ended.value
        assert 0 <= export.size < 1 << 63
        assert not export.size % export.min_block_bytes
        assert export.min_block_bytes <= export.max_payload_bytes
        assert min(512, export.size) <= export.max_payload_bytes
        assert export.is_structured or export.context is None
    except (BrokenError, RefusedError) as error:
        assert_line(error)
    assert sent <= _MAX_SENT_BYTES


def seeds() -> list[bytes]:
    """Return what servers with and without each feature send."""
    blocks = info(messages.INFO_BLOCK_SIZE, 4096, 4096, 1 << 20)
    start_tls = messages.OPTION_REPLY.pack(
        messages.OPTION_REPLY_MAGIC, messages.OPT_STARTTLS, messages.REP_ACK, 0
    )
    return [
        b"\0" + GREETING + STRUCTURED + CONTEXT + blocks + SIZE + GO,
        b"\0" + GREETING + NO_STRUCTURED + SIZE + GO,
        b"\1" + GREETING + start_tls + STRUCTURED + CONTEXT + SIZE + GO,
    ]


TARGET: Final = Target(
    check, seeds, (GREETING, STRUCTURED, CONTEXT, SIZE, GO, NO_STRUCTURED, b"\x80\0\0\1", b"\0\3")
)
