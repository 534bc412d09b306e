"""The messages of the NBD protocol as bytes: constants, requests, and the texts of errors.

The specification is ``doc/proto.md`` of https://github.com/NetworkBlockDevice/nbd.  The names are
those of the specification, shortened: `REPLY_NONE` is ``NBD_REPLY_TYPE_NONE``.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from qedfuse.text import printable, shortened

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_MAGIC: Final = 0x67446698
STRUCTURED_MAGIC: Final = 0x668E33EF

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_STARTTLS: Final = 5
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_IS_ERROR: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_IS_ERROR + 1
REP_ERR_POLICY: Final = REP_IS_ERROR + 2
REP_ERR_TLS_REQD: Final = REP_IS_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_IS_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_IS_ERROR + 7

INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

FLAG_HAS_FLAGS: Final = 1
FLAG_CAN_MULTI_CONN: Final = 1 << 8

CMD_READ: Final = 0
CMD_DISC: Final = 2
CMD_BLOCK_STATUS: Final = 7

REPLY_FLAG_DONE: Final = 1
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_OFFSET_HOLE: Final = 2
REPLY_BLOCK_STATUS: Final = 5
REPLY_IS_ERROR: Final = 1 << 15
REPLY_ERROR_OFFSET: Final = REPLY_IS_ERROR + 2

STATE_ZERO: Final = 2
"""The flag of ``base:allocation`` for a range that reads as zeros."""
ALLOCATION: Final = b"base:allocation"
"""The metadata context that reports which ranges are allocated, and which read as zeros."""

MAX_STRING_BYTES: Final = 4096
"""Maximum length of a string of the protocol, such as the name of an export."""

OPTION: Final = struct.Struct(">8sII")
"""Magic, option, length of the data that follows."""
OPTION_REPLY: Final = struct.Struct(">QIII")
"""Magic, option, type of the reply, length of the data that follows."""
EXPORT_INFO: Final = struct.Struct(">HQH")
"""``INFO_EXPORT``, size, transmission flags."""
BLOCK_INFO: Final = struct.Struct(">HIII")
"""``INFO_BLOCK_SIZE``; minimum block size, preferred block size, maximum payload, all in bytes."""
REQUEST: Final = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""Magic, error, cookie."""
STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of the data that follows."""
ERROR: Final = struct.Struct(">IH")
"""Error, length in bytes of the message that follows."""
DATA_OFFSET: Final = struct.Struct(">Q")
"""Offset in the export of the data that follows, or of an error."""
EXTENT: Final = struct.Struct(">II")
"""Length in bytes, flags."""
HOLE: Final = struct.Struct(">QI")
"""Offset in the export, length in bytes."""

_MAX_SHOWN_CHARACTERS: Final = 200

_ERRNOS: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
}
"""The error numbers of this host, by the error values of the protocol."""


def option(number: int, data: bytes = b"") -> bytes:
    """Return the message that requests option ``number``, with the ``data`` of the option."""
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def request(command: int, cookie: int, offset: int, length: int) -> bytes:
    """Return a request without flags."""
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)


def host_errno(error: int) -> int:
    """Return the error number of this host for an error value; EINVAL for an unknown value."""
    return _ERRNOS.get(error, errno.EINVAL)


def server_text(raw: bytes) -> str:
    """Return a server's message about an error as printable text, which may be empty."""
    text = raw.decode(errors="replace").strip()
    return printable(shortened(text, _MAX_SHOWN_CHARACTERS)) if text else ""
