"""A client for web servers, by urllib3: ranges of one URL, pinned to one version.

A redirection is followed only to the host of the URL itself and to prefixes that the user allows,
so a server cannot make its clients read from other machines.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urldefrag, urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, ProxyError, SSLError

from qedfuse.errors import UsageError
from qedfuse.remote.address import is_below, parse_address
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnusableError,
    Version,
)
from qedfuse.remote.deadline import make_pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3.response import BaseHTTPResponse

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions

# Records of these loggers contain URLs with their queries, which may be secrets.
for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_MAX_REDIRECTS: Final = 5
_MAX_CONNECTIONS: Final = 16
_MAX_DRAINED_BYTES: Final = 1 << 16
"""Maximum rest of an answer that is read for the sake of the connection."""
_CONTENT_RANGE: Final = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")
_ENTITY_TAG: Final = re.compile(r"[\x21-\x7e]+")
"""A strong or weak tag, with or without its quotes; one with other characters is not sent back."""
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_RETRIED_STATUS: Final = (408, 425, 429)
"""Statuses below 500 with which a server asks for another attempt."""


class _BrokenOffError(AttemptError):
    """The server has ended an answer before its end."""


class WebClient:
    """Reads one object of a web server."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        """Read the object at ``address``; the first connection is made by the first call.

        Raises:
            UnusableError: The environment names a proxy that cannot be used.
        """
        self._address = address
        self._options = options
        # Where the last redirection led; another thread may replace it at any time.
        self._target = address
        self._pool = _make_pool(address)

    def head(self) -> Version:
        """Return the object's present version.

        This is a GET of the first byte, because a signed URL permits no HEAD, and because the
        answer shows whether the server can serve ranges.
        """
        with self._open({"Range": "bytes=0-0"}) as response:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            # Only an empty object has no first byte.
            is_empty = response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            if (
                (response.status != HTTPStatus.PARTIAL_CONTENT and not is_empty)
                or match is None
                or is_empty != (match[1] is None)
                or is_empty != (not match[3].strip("0"))
            ):
                raise _no_ranges(response)
            return _version(response, int(match[3]))

    def get(self, offset: int, length: int, version: Version) -> bytearray:
        """Return a range of a version of the object; see `Client.get`."""
        try:
            return self._get(offset, length, version)
        except _BrokenOffError as error:
            # A cache between begins an answer with what it has of an old version, and breaks it off
            # where the store has another one.  Further attempts would end in the same way.
            with suppress(AttemptError, RefusedError, UnusableError):
                if not self.head().is_same(version):
                    raise ChangedError from error
            raise

    def _get(self, offset: int, length: int, version: Version) -> bytearray:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if version.etag:
            headers["If-Match"] = version.etag
        elif version.modified is not None:
            headers["If-Unmodified-Since"] = formatdate(version.modified, usegmt=True)
        with self._open(headers) as response:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise ChangedError
            if response.status != HTTPStatus.PARTIAL_CONTENT or match is None:
                raise _no_ranges(response)
            # The server may have ignored the condition, so its answer is compared as well.
            if not _version(response, int(match[3])).is_same(version):
                raise ChangedError
            if (match[1], match[2]) != (str(offset), str(offset + length - 1)):
                found = f"the range {match[1]}-{match[2]}"
                msg = f"found {found}, expected {offset}-{offset + length - 1}"
                raise AttemptError(msg)
            return _body(response, length)

    def renew(self) -> None:
        """Forget where the last redirection led, because a signed target expires."""
        self._target = self._address

    @contextmanager
    def _open(self, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Make a request; yield the response, after any redirections, without its body.

        At the end of the block the connection is used again if the body was read to its end, and
        closed if not.
        """
        end = time.monotonic() + self._options.attempt_seconds
        target = self._target
        is_remembered = target != self._address
        # If anything fails, the next attempt asks where to read again.
        self._target = self._address
        for _ in range(_MAX_REDIRECTS):
            with self._request(target, headers, end) as response:
                if response.status not in _REDIRECTS:
                    try:
                        self._refuse(response)
                    except (MissingError, UnusableError) as error:
                        if is_remembered:
                            msg = f"{target.shown}: found HTTP status {response.status}"
                            raise AttemptError(msg) from error
                        raise
                    yield response
                    self._target = target
                    return
                target = self._redirected(target, response.headers.get("Location", ""))
                is_remembered = False
        msg = f"found more than {_MAX_REDIRECTS} redirections"
        raise UnusableError(msg)

    @contextmanager
    def _request(
        self, target: Address, headers: dict[str, str], end: float
    ) -> Iterator[BaseHTTPResponse]:
        """Make one request without following a redirection; yield the response.

        The response must be read before the moment ``end``.
        """
        seconds = max(end - time.monotonic(), 0.001)
        try:
            response = self._pool.request(
                "GET",
                target.url,
                headers={"Accept-Encoding": "identity", "User-Agent": "qedfuse", **headers},
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=urllib3.Timeout(
                    total=seconds, connect=min(seconds, self._options.connect_seconds)
                ),
            )
            try:
                yield response
                if (rest := response.length_remaining) is not None and rest <= _MAX_DRAINED_BYTES:
                    response.drain_conn()  # without this, the connection cannot be used again
                else:
                    response.close()
            except BaseException:
                response.close()
                raise
            finally:
                response.release_conn()
        except SSLError as error:
            msg = f"TLS: {_reason(error)}"
            raise AttemptError(msg) from error
        except ProxyError as error:
            msg = f"proxy: {_reason(error)}"
            raise AttemptError(msg) from error
        except (HTTPError, OSError) as error:
            raise AttemptError(_reason(error)) from error

    def _redirected(self, source: Address, location: str) -> Address:
        """Return the target of a redirection.

        Raises:
            UnusableError: The target is not allowed.
        """
        try:
            target = parse_address(urldefrag(urljoin(source.url, location)).url)
        except UsageError as error:
            msg = f"found a redirection that is no usable URL ({error})"
            raise UnusableError(msg) from error
        except ValueError as error:
            msg = "found a redirection that is no URL"
            raise UnusableError(msg) from error
        origin = (self._address.scheme, self._address.host)
        if (target.scheme, target.host) == origin:
            return target
        is_private = target.scheme == "https" or target.is_loopback or self._options.allow_http
        is_allowed = any(is_below(target, prefix) for prefix in self._options.redirect_prefixes)
        if target.is_web and is_private and is_allowed:
            return target
        msg = (
            f"found a redirection to {target.shown}, expected one on the same host "
            f"(allow it with backing_url={target.scheme}://{target.host}/)"
        )
        raise UnusableError(msg)

    def _refuse(self, response: BaseHTTPResponse) -> None:
        """Raise the exception for a status that is no success; return if there is none."""
        status = response.status
        if status in {200, 206, 416}:
            return
        if status == HTTPStatus.PRECONDITION_FAILED:
            raise ChangedError
        if status in {404, 410}:
            raise MissingError
        msg = f"found HTTP status {status}"
        if status in {401, 403, 407}:
            raise RefusedError(msg)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _RETRIED_STATUS:
            raise AttemptError(msg)
        msg += ", expected 206"
        raise UnusableError(msg)


def _make_pool(address: Address) -> urllib3.PoolManager:
    """Return the connections for an address: through a proxy, if the environment names one.

    Raises:
        UnusableError: The URL of the proxy cannot be used.
    """
    name = address.host
    proxy = None if address.is_loopback or proxy_bypass(name) else getproxies().get(address.scheme)
    try:
        return make_pool(proxy or None, _MAX_CONNECTIONS)
    except HTTPError as error:
        # The URL of a proxy may contain a password.
        msg = f"found a proxy in the environment that is no usable URL ({address.scheme}_proxy)"
        raise UnusableError(msg) from error


def _version(response: BaseHTTPResponse, size: int) -> Version:
    """Return the version that a response is about."""
    etag = response.headers.get("ETag", "")
    # A weak tag is equal for contents that differ.
    if etag.startswith("W/") or not _ENTITY_TAG.fullmatch(etag):
        etag = ""
    modified = None
    with suppress(ValueError, TypeError, LookupError, ArithmeticError, OSError):
        modified = parsedate_to_datetime(response.headers.get("Last-Modified", "")).timestamp()
    return Version(size, etag, modified)


def _body(response: BaseHTTPResponse, length: int) -> bytearray:
    """Return the body, which must have ``length`` bytes."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        msg = f"found the content encoded as {encoding}, expected no encoding"
        raise UnusableError(msg)
    content = bytearray(length)
    view = memoryview(content)
    done = 0
    while done < length:
        try:
            part = response.read1(min(1 << 18, length - done), decode_content=False)
        except ProtocolError as error:
            raise _BrokenOffError(_reason(error)) from error
        if not part:
            msg = f"found {done} bytes, expected {length}"
            raise _BrokenOffError(msg)
        view[done : done + len(part)] = part
        done += len(part)
    return content


def _no_ranges(response: BaseHTTPResponse) -> UnusableError:
    """Return the error for a server that ignores ``Range``."""
    return UnusableError(
        f"found HTTP status {response.status} without a range, expected a server of ranges"
    )


def _reason(error: Exception) -> str:
    """Return the cause of a failed request, in one line."""
    cause: object = error
    innermost = error
    while isinstance(cause, Exception):
        innermost = cause
        # urllib3 wraps the cause: as an attribute, or as the last argument.
        cause = getattr(cause, "reason", None) or (cause.args[-1] if cause.args else None)
    text = getattr(innermost, "strerror", None) or str(innermost)
    return " ".join(text.rpartition("): ")[2].split()) or type(innermost).__name__
