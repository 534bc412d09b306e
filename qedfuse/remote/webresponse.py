"""Reading the responses of web servers: range, version, body, and errors of requests.

Servers are not trusted: a response whose headers and body contradict each other is an error.
"""

from __future__ import annotations

import re
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final

from urllib3.exceptions import (
    ConnectTimeoutError,
    NameResolutionError,
    ProtocolError,
    ProxyError,
    SSLError,
)
from urllib3.exceptions import (
    TimeoutError as HTTPTimeoutError,
)
from urllib3.response import HTTPResponse

from qedfuse.remote.client import AttemptError, UnreachableError, UnusableError, Version
from qedfuse.text import printable

if not hasattr(HTTPResponse, "read1"):
    msg = "found urllib3 before 2.2"
    raise ImportError(msg)

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

_CONTENT_RANGE: Final = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")
_ENTITY_TAG: Final = re.compile(r"[\x21-\x7e]+")
"""An entity tag, with or without quotes.  A tag with other characters is ignored, because it could
break the header of a request."""
_MAX_READ_BYTES: Final = 1 << 18


class TruncatedError(AttemptError):
    """The server has ended a response before the end of its body."""


def content_range(response: BaseHTTPResponse) -> tuple[range | None, int] | None:
    """Return the range in the header ``Content-Range``, and the size of the object.

    The range is None if the header has only the size.  Returns None instead of both if the header
    is missing or not valid.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        return None
    size = int(match[3])
    return (None if match[1] is None else range(int(match[1]), int(match[2]) + 1)), size


def version_of(response: BaseHTTPResponse, size: int) -> Version:
    """Return the version of an object of ``size`` bytes that the headers of a response describe."""
    etag = response.headers.get("ETag", "")
    # A weak tag is equal for contents that differ.
    if etag.startswith("W/") or not _ENTITY_TAG.fullmatch(etag):
        etag = ""
    return Version(size, etag, _time(response, "Last-Modified"))


def seconds_since_change(response: BaseHTTPResponse) -> float | None:
    """Return the seconds since the last change, by the server's clock; None if unknown."""
    modified, now = _time(response, "Last-Modified"), _time(response, "Date")
    return None if modified is None or now is None else now - modified


def read_body(response: BaseHTTPResponse, length: int) -> bytearray:
    """Read the body of a response, which must have ``length`` bytes; return the body.

    Raises:
        TruncatedError: The body is shorter.
        AttemptError: The body is longer.
        UnusableError: The body is encoded.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        found = printable(encoding[:40])
        msg = f"found the content encoded as {found}, expected no encoding"
        raise UnusableError(msg)
    if response.length_remaining not in (None, length):
        msg = f"found {response.length_remaining} bytes, expected {length}"
        raise AttemptError(msg)
    content = bytearray(length)
    view = memoryview(content)
    done = 0
    while done < length:
        try:
            part = response.read1(min(_MAX_READ_BYTES, length - done), decode_content=False)
        except ProtocolError as error:
            msg = f"found an answer that breaks off, expected {length} bytes"
            raise TruncatedError(msg) from error
        if not part:
            msg = f"found {done} bytes, expected {length}"
            raise TruncatedError(msg)
        if len(part) > length - done:
            # The length of a chunk is negative, so the standard library returns what it has.
            msg = f"found a chunk of an impossible length, expected {length} bytes"
            raise AttemptError(msg)
        view[done : done + len(part)] = part
        done += len(part)
    # Without Content-Length, only a further read shows the end of the body.
    if response.read1(1, decode_content=False):
        msg = f"found more than {length} bytes, expected {length}"
        raise AttemptError(msg)
    return content


def no_range_error(response: BaseHTTPResponse) -> UnusableError:
    """Return the error for a response without the requested range."""
    return UnusableError(
        f"found HTTP status {response.status} without a range, expected a server that sends ranges"
    )


def translated(error: Exception) -> Exception:
    """Return the exception of `qedfuse.remote.client` for a failed request of urllib3."""
    about = ""
    while isinstance(error, ProxyError):
        about, error = "proxy: ", error.original_error
    if isinstance(error, SSLError):
        return _tls_failure(error, about)
    if isinstance(error, NameResolutionError):
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else ""
        return UnreachableError(f"{about}found no address of the host ({reason}), expected one")
    if isinstance(error, ConnectTimeoutError):
        return UnreachableError(about + _reason(error))
    if isinstance(error, (HTTPTimeoutError, TimeoutError)):
        return AttemptError(f"{about}found no answer in time")
    if about:
        return UnreachableError(about + _reason(error))
    return AttemptError(_reason(error))


def _tls_failure(error: SSLError, about: str) -> Exception:
    """Return the exception for a failure of TLS."""
    cause = error.args[0] if error.args else None
    if isinstance(cause, ssl.SSLCertVerificationError):
        found = printable(str(cause.verify_message).rstrip("."))
        return UnusableError(
            f"{about}TLS: certificate: found {found}, expected one that is trusted (SSL_CERT_FILE "
            "names a file with others)"
        )
    return UnreachableError(f"{about}TLS: {_reason(error)}")


def _time(response: BaseHTTPResponse, name: str) -> float | None:
    """Return the time in the header ``name`` in seconds since 1970; None if there is none."""
    with suppress(ValueError, TypeError, LookupError, ArithmeticError, OSError):
        moment: datetime = parsedate_to_datetime(response.headers.get(name, ""))
        if moment.tzinfo is None:  # the zone "-0000" means UTC
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp()
    return None


def _reason(error: Exception) -> str:
    """Return the cause of a failed request, in one line."""
    cause: object = error
    innermost = error
    while isinstance(cause, Exception):
        innermost = cause
        # urllib3 wraps the cause: as an attribute, or as the last argument.
        cause = getattr(cause, "reason", None) or (cause.args[-1] if cause.args else None)
    text = getattr(innermost, "strerror", None) or str(innermost)
    return " ".join(printable(text).rpartition("): ")[2].split()) or type(innermost).__name__
