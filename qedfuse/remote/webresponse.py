"""Reading the responses of web servers: range, version and body; errors of failed requests.

Servers are not trusted: a response whose headers and body contradict each other is an error.
"""

from __future__ import annotations

import re
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Final

from urllib3.exceptions import (
    ConnectTimeoutError,
    NameResolutionError,
    ProxyError,
    SSLError,
)
from urllib3.exceptions import (
    TimeoutError as HTTPTimeoutError,
)
from urllib3.response import HTTPResponse

from qedfuse.remote.client import (
    AttemptError,
    UnreachableError,
    UnusableError,
    Version,
    certificate_message,
)
from qedfuse.remote.deadline import TimedResponse
from qedfuse.text import printable

if not hasattr(HTTPResponse, "read1"):
    msg = "found urllib3 before 2.2"
    raise ImportError(msg)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from urllib3.response import BaseHTTPResponse

    from qedfuse.hostio.hostfile import Buffer

_CONTENT_RANGE: Final = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")
_ENTITY_TAG: Final = re.compile(r"[\x21-\x7e]+")
"""An entity tag.  One with other characters is ignored: it could break the header of a request."""


class TruncatedError(AttemptError):
    """The server has ended a response before the end of its body."""


def content_range(response: BaseHTTPResponse) -> tuple[range | None, int] | None:
    """Return the range in the header ``Content-Range``, and the size of the object.

    The range is None if the header has only the size.  The result is None if the header is missing
    or invalid.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        return None
    size = int(match[3])
    return (None if match[1] is None else range(int(match[1]), int(match[2]) + 1)), size


def is_whole_empty_object(response: BaseHTTPResponse) -> bool:
    """Return whether the response to a request for a range is a whole object without content.

    Some servers that serve ranges (Apache) send it in place of status 416.
    """
    return (
        response.status == HTTPStatus.OK
        and response.length_remaining == 0
        and response.headers.get("Accept-Ranges", "").lower() == "bytes"
    )


def version_of(response: BaseHTTPResponse, size: int) -> Version:
    """Return the version of an object: ``size``, and the tag and time in a response's headers."""
    etag = response.headers.get("ETag", "")
    # A weak tag can be equal for contents that differ.
    if etag.startswith("W/") or not _ENTITY_TAG.fullmatch(etag):
        etag = ""
    return Version(size, etag, _time(response, "Last-Modified"))


def seconds_since_change(response: BaseHTTPResponse) -> float | None:
    """Return the seconds since the last change, by the server's clock; None if unknown."""
    modified, now = _time(response, "Last-Modified"), _time(response, "Date")
    return None if modified is None or now is None else now - modified


def read_parts(
    response: BaseHTTPResponse,
    lengths: Sequence[int],
    part_seconds: float,
    allocate: Callable[[int], Buffer] = bytearray,
) -> Generator[Buffer]:
    """Read the body of a response part by part; yield a buffer with each part.

    The body must be as long as all parts together.

    Args:
        response: The response of a pool of `qedfuse.remote.deadline`.
        lengths: The length in bytes of each part; there must be at least one part.
        part_seconds: Maximum time for each part after the first one.
        allocate: Returns a buffer of a given length for a part.

    Raises:
        TruncatedError: The body is shorter than the parts, or the connection broke off.
        AttemptError: The body is longer than the parts, or the header gives another length.
        OSError: A part did not arrive in time, or the connection failed in another way.
        UnusableError: The body has a content encoding, such as gzip.
        TypeError: The response is not of a pool of `qedfuse.remote.deadline`.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        found = printable(encoding[:40])
        msg = f"found the content encoded as {found}, expected no encoding"
        raise UnusableError(msg)
    length = sum(lengths)
    if response.length_remaining not in (None, length):
        msg = f"found {response.length_remaining} bytes, expected {length}"
        raise AttemptError(msg)
    # The body is read from `http.client`, because urllib3's methods would copy it twice.
    body = getattr(response, "_original_response", None)
    if not isinstance(body, TimedResponse):
        msg = f"found a body of type {type(body).__name__}, expected one of TimedResponse"
        raise TypeError(msg)
    for number, part_length in enumerate(lengths):
        if number:
            body.restart_timeout(part_seconds)
        part = allocate(part_length)
        _read_into(body, memoryview(part))
        if number == len(lengths) - 1:
            # Without Content-Length, only a further read shows the end of the body.
            if _read_some(body, memoryview(bytearray(1)), length):
                msg = f"found more than {length} bytes, expected {length}"
                raise AttemptError(msg)
            if response.length_remaining is not None:
                response.length_remaining = 0
        yield part


def _read_into(body: TimedResponse, view: memoryview) -> None:
    """Fill ``view`` from the body of a response."""
    done = 0
    while done < len(view):
        count = _read_some(body, view[done:], len(view))
        if not count:
            raise _truncated_error(len(view))
        done += count


def _read_some(body: TimedResponse, view: memoryview, expected: int) -> int:
    """Read into ``view``; return how many bytes were read: 0 at the end of the body.

    ``expected`` is for the message of a `TruncatedError`.
    """
    try:
        return body.readinto(view)
    except (HTTPException, ConnectionError) as error:
        raise _truncated_error(expected) from error


def _truncated_error(expected: int) -> TruncatedError:
    """Return the error for a response that breaks off.

    ``expected`` is the number of bytes in the message: of a part, or of the whole body.
    """
    return TruncatedError(f"found an answer that breaks off, expected {expected} bytes")


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
        return UnusableError(f"{about}{certificate_message(found)}")
    return UnreachableError(f"{about}TLS: {_reason(error)}")


def _time(response: BaseHTTPResponse, name: str) -> float | None:
    """Return the time in the header ``name`` in seconds since 1970; None if missing or invalid."""
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
    # urllib3 puts the connection before the reason: "HTTPSConnection(host=..., port=...): reason".
    text = getattr(innermost, "strerror", None) or str(innermost)
    return " ".join(printable(text).rpartition("): ")[2].split()) or type(innermost).__name__
