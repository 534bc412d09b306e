"""The handshake with an NBD server (fixed newstyle), without any I/O.

The generator `handshake` yields steps, which its caller, the driver, performs on a socket.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from qedfuse.nbd import messages
from qedfuse.nbd.failures import BrokenError, ProtocolError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Generator

_MAX_REPLY_BYTES: Final = 64 << 10
"""Maximum length of the data of a reply to an option."""
_MAX_REPLIES: Final = 64
"""Maximum number of replies to one option."""
_MAX_BLOCK_BYTES: Final = 1 << 16
"""The largest minimum block size that the protocol allows."""
_DEFAULT_MAX_PAYLOAD_BYTES: Final = 32 << 20
"""Maximum length of a read if the server does not state one."""
_MIN_PAYLOAD_BYTES: Final = 512
"""The smallest maximum length of a read that the protocol allows, unless the export is shorter."""
_SIZE_LIMIT: Final = 1 << 63
"""The size of an export in bytes must be below this."""

_ERRORS: Final = {
    messages.REP_ERR_UNSUP: ("found a server without {}, expected one with it", errno.EOPNOTSUPP),
    messages.REP_ERR_POLICY: ("found that the server refuses {}, expected access", errno.EACCES),
    messages.REP_ERR_TLS_REQD: (
        "found a server that requires TLS, expected a URL that begins with nbds",
        errno.EACCES,
    ),
    messages.REP_ERR_UNKNOWN: ("found no such export", errno.ENOENT),
}
"""For each error reply: a message, in which ``{}`` stands for the refused feature, and an errno."""


@dataclass(frozen=True, slots=True)
class Export:
    """The properties of an export, as the server has stated them.

    Attributes:
        size: Length in bytes.
        min_block_bytes: Offsets and lengths of requests must be multiples of this power of two.
        max_payload_bytes: Maximum length of a read, at least ``min_block_bytes``, and at least 512
            or the size of the export.
        can_multi_conn: Whether several connections to the export are allowed.
        is_structured: Whether replies are structured.
        context: The number of the metadata context ``base:allocation`` in replies; None if the
            server does not serve it.
    """

    size: int
    min_block_bytes: int = 1
    max_payload_bytes: int = _DEFAULT_MAX_PAYLOAD_BYTES
    can_multi_conn: bool = False
    is_structured: bool = False
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """The driver must send ``data``."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Receive:
    """The driver must receive exactly ``length`` bytes, and send them into the generator."""

    length: int


@dataclass(frozen=True, slots=True)
class StartTls:
    """The driver must start TLS on the connection."""


Step: TypeAlias = Send | Receive | StartTls
Steps: TypeAlias = "Generator[Step, bytes, Export]"


def handshake(name: str, *, use_tls: bool) -> Steps:
    """Choose the export ``name`` of a server; return the properties of the export.

    Args:
        name: The name of the export; empty for the default export of the server.
        use_tls: Whether to start TLS first.

    Raises:
        ProtocolError: The server violates the protocol.
        BrokenError: The server is shutting down.
        RefusedError: The server does not serve the export, or this client cannot use it.
    """
    greeting = yield Receive(18)
    if greeting[:8] != messages.INIT_MAGIC:
        msg = "found no greeting of an NBD server"
        raise ProtocolError(msg)
    if greeting[8:16] != messages.OPTION_MAGIC:
        is_old = int.from_bytes(greeting[8:16], "big") == messages.OLDSTYLE_MAGIC
        msg = f"found {'the old' if is_old else 'an unknown'} protocol, expected fixed newstyle NBD"
        raise RefusedError(msg, errno.EPROTONOSUPPORT)
    flags = int.from_bytes(greeting[16:], "big")
    if not flags & messages.FLAG_FIXED_NEWSTYLE:
        msg = "found the newstyle protocol without options, expected fixed newstyle NBD"
        raise RefusedError(msg, errno.EPROTONOSUPPORT)
    wanted = flags & (messages.FLAG_FIXED_NEWSTYLE | messages.FLAG_NO_ZEROES)
    yield Send(wanted.to_bytes(4, "big"))
    if use_tls:
        yield Send(messages.option(messages.OPT_STARTTLS))
        kind, data = yield from _reply(messages.OPT_STARTTLS)
        if kind & messages.REP_IS_ERROR:
            raise RefusedError(*_refusal("TLS", kind, data))
        if kind != messages.REP_ACK or data:
            raise ProtocolError(_unexpected("STARTTLS", kind, data))
        yield StartTls()
    is_structured, context = yield from _choose_replies(name)
    return (yield from _go(name, is_structured=is_structured, context=context))


def _choose_replies(name: str) -> Generator[Step, bytes, tuple[bool, int | None]]:
    """Negotiate structured replies; return whether they are used, and `Export.context`."""
    yield Send(messages.option(messages.OPT_STRUCTURED_REPLY))
    kind, data = yield from _reply(messages.OPT_STRUCTURED_REPLY)
    if kind & messages.REP_IS_ERROR:
        return False, None
    if kind != messages.REP_ACK or data:
        raise ProtocolError(_unexpected("STRUCTURED_REPLY", kind, data))
    query = _string(messages.ALLOCATION)
    yield Send(
        messages.option(
            messages.OPT_SET_META_CONTEXT, _string(name.encode()) + (1).to_bytes(4, "big") + query
        )
    )
    context = None
    for _ in range(_MAX_REPLIES):
        kind, data = yield from _reply(messages.OPT_SET_META_CONTEXT)
        if kind & messages.REP_IS_ERROR:
            return True, None
        if kind == messages.REP_ACK and not data:
            return True, context
        if kind != messages.REP_META_CONTEXT or len(data) < 4:  # noqa: PLR2004  identifier
            raise ProtocolError(_unexpected("SET_META_CONTEXT", kind, data))
        if data[4:] != messages.ALLOCATION:
            msg = "found another metadata context than the one that was asked for"
            raise ProtocolError(msg)
        if context is not None:
            msg = "found two replies with the metadata context, expected one"
            raise ProtocolError(msg)
        context = int.from_bytes(data[:4], "big")
    raise ProtocolError(_too_many("SET_META_CONTEXT"))


def _go(name: str, *, is_structured: bool, context: int | None) -> Steps:
    """Choose the export by the option GO, which ends the handshake; return the export."""
    wanted = [messages.INFO_BLOCK_SIZE]
    data = _string(name.encode()) + len(wanted).to_bytes(2, "big")
    data += b"".join(info.to_bytes(2, "big") for info in wanted)
    yield Send(messages.option(messages.OPT_GO, data))
    size = flags = None
    min_block, max_payload = 1, _DEFAULT_MAX_PAYLOAD_BYTES
    for _ in range(_MAX_REPLIES):
        kind, data = yield from _reply(messages.OPT_GO)
        if kind & messages.REP_IS_ERROR:
            raise RefusedError(*_refusal("the option GO", kind, data))
        if kind == messages.REP_ACK and not data and size is not None and flags is not None:
            return Export(
                size=size,
                min_block_bytes=min_block,
                max_payload_bytes=max_payload,
                can_multi_conn=bool(flags & messages.FLAG_CAN_MULTI_CONN),
                is_structured=is_structured,
                context=context,
            )
        if kind != messages.REP_INFO or len(data) < 2:  # noqa: PLR2004  the type of information
            raise ProtocolError(_unexpected("GO", kind, data))
        info = int.from_bytes(data[:2], "big")
        if info == messages.INFO_EXPORT:
            size, flags = _parse_export(data)
        elif info == messages.INFO_BLOCK_SIZE:
            min_block, max_payload = _parse_blocks(data)
        if size is not None and size % min_block:
            msg = f"found a size of {size} bytes, expected a multiple of its block size {min_block}"
            raise RefusedError(msg, errno.EINVAL)
        # A smaller maximum would split each read into many requests: memory, and time in the event
        # loop.
        if size is not None and max_payload < min(_MIN_PAYLOAD_BYTES, size):
            msg = (
                f"found a maximum payload of {max_payload} bytes, expected at least "
                f"{min(_MIN_PAYLOAD_BYTES, size)}"
            )
            raise RefusedError(msg, errno.EINVAL)
    raise ProtocolError(_too_many("GO"))


def _reply(asked: int) -> Generator[Step, bytes, tuple[int, bytes]]:
    """Receive a reply to the option ``asked``; return its type and its data."""
    magic, option, kind, length = messages.OPTION_REPLY.unpack(
        (yield Receive(messages.OPTION_REPLY.size))
    )
    if (magic, option) != (messages.OPTION_REPLY_MAGIC, asked):
        msg = "found no reply to the option that was sent"
        raise ProtocolError(msg)
    if length > _MAX_REPLY_BYTES:
        msg = f"found a reply of {length} bytes to an option, expected at most {_MAX_REPLY_BYTES}"
        raise ProtocolError(msg)
    data = (yield Receive(length)) if length else b""
    if kind == messages.REP_ERR_SHUTDOWN:
        msg = "found a server that is shutting down"
        raise BrokenError(msg)
    return kind, data


def _parse_export(data: bytes) -> tuple[int, int]:
    """Return the size in bytes and the flags of an export."""
    if len(data) != messages.EXPORT_INFO.size:
        msg = f"found a description of {len(data)} bytes, expected {messages.EXPORT_INFO.size}"
        raise ProtocolError(msg)
    _, size, flags = messages.EXPORT_INFO.unpack(data)
    if size >= _SIZE_LIMIT:
        msg = f"found a size of {size} bytes, expected less than {_SIZE_LIMIT}"
        raise RefusedError(msg, errno.EFBIG)
    return size, flags


def _parse_blocks(data: bytes) -> tuple[int, int]:
    """Return the minimum block size and the maximum payload of an export, in bytes."""
    if len(data) != messages.BLOCK_INFO.size:
        msg = f"found block sizes in {len(data)} bytes, expected {messages.BLOCK_INFO.size}"
        raise ProtocolError(msg)
    _, min_block, _, max_payload = messages.BLOCK_INFO.unpack(data)
    if not 0 < min_block <= _MAX_BLOCK_BYTES or min_block & (min_block - 1):
        msg = (
            f"found a minimum block of {min_block} bytes, expected a power of two of at most "
            f"{_MAX_BLOCK_BYTES}"
        )
        raise RefusedError(msg, errno.EINVAL)
    if max_payload < min_block:
        msg = f"found a maximum payload of {max_payload} bytes, expected at least {min_block}"
        raise RefusedError(msg, errno.EINVAL)
    return min_block, max_payload


def _string(raw: bytes) -> bytes:
    """Return a string as the protocol sends it: its length, then its bytes."""
    return len(raw).to_bytes(4, "big") + raw


def _refusal(feature: str, kind: int, data: bytes) -> tuple[str, int]:
    """Return the message and the errno for a refused ``feature``, such as TLS."""
    error_code = kind - messages.REP_IS_ERROR
    message, number = _ERRORS.get(kind, (f"found error {error_code} for {{}}", errno.EIO))
    message = message.format(feature)
    text = messages.server_text(data)
    return f"{message} ({text})" if text else message, number


def _unexpected(option: str, kind: int, data: bytes) -> str:
    """Return the message about a reply whose type or length does not fit its option."""
    return f"found an invalid reply to {option} (type {kind}, {len(data)} bytes of data)"


def _too_many(option: str) -> str:
    return f"found more than {_MAX_REPLIES} replies to {option}"
