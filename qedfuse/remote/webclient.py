"""A client for web servers, by urllib3: ranges of one URL, pinned to one version.

A redirection is followed only to the host of the URL itself and to prefixes that the user allows,
so a server cannot make its clients read from other machines.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, ProxyError, SSLError

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3.response import BaseHTTPResponse

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions

_MAX_REDIRECTS: Final = 5
_MAX_CONNECTIONS: Final = 16
_MAX_DRAINED_BYTES: Final = 1 << 16
"""Maximum rest of an answer that is read for the sake of the connection."""
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_RETRIED_STATUS: Final = (408, 425, 429)
"""Statuses below 500 with which a server asks for another attempt."""


class WebClient:
    """Reads one object of a web server."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        """Read the object at ``address``; the first connection is made by the first call."""
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
            if (
                response.status
                not in {HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}
                or match is None
            ):
                raise _no_ranges(response)
            return _version(response, int(match[3]))

    def get(self, offset: int, length: int, version: Version) -> bytearray:
        """Return a range of a version of the object; see `Client.get`."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if version.etag:
            headers["If-Match"] = version.etag
        elif version.modified is not None:
            headers["If-Unmodified-Since"] = formatdate(version.modified, usegmt=True)
        end = time.monotonic() + self._options.attempt_seconds
        with self._open(headers) as response:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise ChangedError
            if response.status != HTTPStatus.PARTIAL_CONTENT or match is None:
                raise _no_ranges(response)
            # The server may have ignored the condition, so its answer is compared as well.
            if _version(response, int(match[3])) != version:
                raise ChangedError
            if (match[1], match[2]) != (str(offset), str(offset + length - 1)):
                found = f"the range {match[1]}-{match[2]}"
                msg = f"found {found}, expected {offset}-{offset + length - 1}"
                raise AttemptError(msg)
            return _body(response, length, end)

    def renew(self) -> None:
        """Forget where the last redirection led, because a signed target expires."""
        self._target = self._address

    @contextmanager
    def _open(self, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Make a request; yield the response, after any redirections, without its body.

        At the end of the block the connection is used again if the body was read to its end, and
        closed if not.
        """
        target = self._target
        for _ in range(_MAX_REDIRECTS):
            with self._request(target, headers) as response:
                if response.status not in _REDIRECTS:
                    self._target = target
                    self._refuse(response)
                    yield response
                    return
                target = self._redirected(target, response.headers.get("Location", ""))
        msg = f"found more than {_MAX_REDIRECTS} redirections"
        raise UnusableError(msg)

    @contextmanager
    def _request(self, target: Address, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Make one request without following a redirection; yield the response."""
        try:
            response = self._pool.request(
                "GET",
                target.url,
                headers={"Accept-Encoding": "identity", "User-Agent": "qedfuse", **headers},
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=urllib3.Timeout(
                    total=self._options.attempt_seconds, connect=self._options.connect_seconds
                ),
            )
            try:
                yield response
                if (response.length_remaining or 0) <= _MAX_DRAINED_BYTES:
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
            target = parse_address(urljoin(source.url, location))
        except UsageError as error:
            msg = f"found a redirection that is no usable URL ({error})"
            raise UnusableError(msg) from error
        origin = (self._address.scheme, self._address.host)
        if (target.scheme, target.host) == origin or any(
            is_below(target, prefix) for prefix in self._options.redirect_prefixes
        ):
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
    """Return the connections for an address: through a proxy, if the environment names one."""
    name = address.host
    proxy = None if address.is_loopback or proxy_bypass(name) else getproxies().get(address.scheme)
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=_MAX_CONNECTIONS)
    return urllib3.PoolManager(maxsize=_MAX_CONNECTIONS)


def _version(response: BaseHTTPResponse, size: int) -> Version:
    """Return the version that a response is about."""
    etag = response.headers.get("ETag", "")
    if etag.startswith("W/"):  # a weak tag is equal for contents that differ
        etag = ""
    modified = None
    with suppress(ValueError):
        modified = parsedate_to_datetime(response.headers.get("Last-Modified", "")).timestamp()
    return Version(size, etag, modified)


def _body(response: BaseHTTPResponse, length: int, end: float) -> bytearray:
    """Return the body, which must have ``length`` bytes; ``end`` is the attempt's deadline."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        msg = f"found the content encoded as {encoding}, expected no encoding"
        raise UnusableError(msg)
    content = bytearray(length)
    view = memoryview(content)
    done = 0
    while done < length:
        if time.monotonic() > end:
            msg = "the answer took too long"
            raise AttemptError(msg)
        part = response.read1(min(1 << 18, length - done), decode_content=False)
        if not part:
            msg = f"found {done} bytes, expected {length}"
            raise AttemptError(msg)
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
