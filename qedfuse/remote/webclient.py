"""A client for web servers: reads ranges of one version of the object at a URL.

A redirection is followed only to the host of the URL itself, and to prefixes that the user allows.
So a server cannot make its clients send requests to any other machine.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import HTTPError

from qedfuse.errors import UsageError
from qedfuse.remote.address import is_below, is_url, parse_address
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnusableError,
    settled_version,
)
from qedfuse.remote.webcredentials import HINT, WebCredentials
from qedfuse.remote.webpools import WebPools
from qedfuse.remote.webresponse import (
    TruncatedError,
    content_range,
    is_whole_empty_object,
    no_range_error,
    read_parts,
    seconds_since_change,
    translated,
    version_of,
)
from qedfuse.text import shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from urllib3.response import BaseHTTPResponse

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions, Version

# Records of these loggers contain URLs, whose queries may be secrets.
for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_MAX_REDIRECTS: Final = 5
_MAX_SHOWN_CHARACTERS: Final = 300
"""How much of the target of a redirection is shown in a message."""
_MAX_DRAINED_BYTES: Final = 1 << 16
"""If at most this many bytes of a body are left, they are read to keep the connection."""
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_RETRIED_STATUS: Final = (408, 409, 425, 429)
"""Statuses below 500 after which another attempt can succeed.  Swift answers 409 for an object
that it cannot read at the moment."""
_PERMANENT_STATUS: Final = (501, 505)
"""Statuses above 500 for requests that the server does not support."""


class WebClient:
    """Reads one object of a web server."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        """Make a client for the object at ``address``, without a connection yet.

        Raises:
            UnusableError: The proxy of the environment or the credentials cannot be used.
        """
        self._address = address
        self._options = options
        self._credentials = WebCredentials(options.credentials)
        # The target of the last redirection.  Other threads may replace it at any time.
        self._target = address
        self._pools = WebPools()
        self._pools.pool_for(address)

    @property
    def store_id(self) -> str:
        """Empty, because the URL names the server; see `Client.store_id`."""
        return ""

    def head(self) -> Version:
        """Return the object's present version.

        The request is a GET of the first byte, because some signed URLs permit no HEAD.  Besides,
        the response shows whether the server can serve ranges.
        """
        return settled_version(self._query)

    def _query(self) -> tuple[Version, float | None]:
        """Return the object's present version, and the result of `seconds_since_change`."""
        with self._open({"Range": "bytes=0-0"}) as response:
            found, size = content_range(response) or (None, -1)
            # Only an empty object has no first byte.
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                is_valid = found is None and size == 0
            elif is_whole_empty_object(response):
                is_valid, found, size = True, None, 0
            else:
                is_valid = response.status == HTTPStatus.PARTIAL_CONTENT and found == range(1)
            if not is_valid or (found is not None and not size):
                raise no_range_error(response)
            if size:
                next(read_parts(response, [1], self._options.attempt_seconds))
            return version_of(response, size), seconds_since_change(response)

    def get(
        self,
        offset: int,
        lengths: Sequence[int],
        version: Version,
        allocate: Callable[[int], Buffer] = bytearray,
    ) -> Generator[Buffer]:
        """Yield adjacent parts of a version of the object; see `Client.get`."""
        try:
            yield from self._get(offset, lengths, version, allocate)
        except TruncatedError as error:
            # The object may have changed.  Then a caching server can send the slices that it has of
            # the old version, and end the response at the first one that it lacks.  A retry would
            # end at the same slice.  So ask which version the server has now.
            with suppress(AttemptError, RefusedError, UnusableError):
                if not self._query()[0].is_same(version):
                    raise ChangedError from error
            raise

    def _get(
        self,
        offset: int,
        lengths: Sequence[int],
        version: Version,
        allocate: Callable[[int], Buffer] = bytearray,
    ) -> Generator[Buffer]:
        """Yield adjacent parts of a version of the object with one request."""
        length = sum(lengths)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        if version.etag:
            headers["If-Match"] = version.etag
        elif version.modified is not None:
            headers["If-Unmodified-Since"] = formatdate(version.modified, usegmt=True)
        with self._open(headers) as response:
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise ChangedError
            found = content_range(response)
            if response.status != HTTPStatus.PARTIAL_CONTENT or found is None:
                raise no_range_error(response)
            # The server may have ignored the header with the condition (``If-...``).
            if not version_of(response, found[1]).is_same(version):
                raise ChangedError
            if found[0] != range(offset, offset + length):
                msg = f"found another range, expected {offset}-{offset + length - 1}"
                raise AttemptError(msg)
            yield from read_parts(response, lengths, self._options.attempt_seconds, allocate)

    def renew(self) -> None:
        """Read the credentials again, and forget the target of the last redirection.

        The target may be a signed URL that has expired.

        Raises:
            UnusableError: The credentials file cannot be read, or is not valid.
        """
        self._target = self._address
        self._options = self._options.renewed()
        self._credentials = WebCredentials(self._options.credentials)

    @contextmanager
    def _open(self, headers: dict[str, str]) -> Iterator[BaseHTTPResponse]:
        """Make a request and follow redirections; yield the response, whose body is not read yet.

        After the caller's ``with`` block, the connection is kept if at most `_MAX_DRAINED_BYTES` of
        the body are left, and closed otherwise.
        """
        end = time.monotonic() + self._options.attempt_seconds
        remembered = target = self._target
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                with self._request(target, headers, end) as response:
                    if response.status not in _REDIRECTS:
                        self._raise_for_status(response, target)
                        yield response
                        self._target = target
                        return
                    target = self._redirected(target, response.headers.get("Location", ""))
        except BaseException as error:
            # After any failure, the next attempt follows the redirections from the beginning.
            self._target = self._address
            # MissingError and UnusableError end all retries.  But the remembered target may be a
            # signed URL that has expired, so an error of this target permits a retry.
            is_permanent = isinstance(error, (MissingError, UnusableError))
            if is_permanent and target is remembered is not self._address:
                msg = f"{target.shown}: {str(error) or 'found no such object'}"
                raise AttemptError(msg) from error
            raise
        self._target = self._address
        msg = f"found more than {_MAX_REDIRECTS} redirections"
        raise UnusableError(msg)

    @contextmanager
    def _request(
        self, target: Address, headers: dict[str, str], end: float
    ) -> Iterator[BaseHTTPResponse]:
        """Make one request without following a redirection; yield the response.

        Reading the response fails after ``end``, a value of ``time.monotonic()``, unless the caller
        extends the time (`TimedResponse.restart_timeout`).
        """
        seconds = max(end - time.monotonic(), 0.001)
        try:
            response = self._pools.pool_for(target).request(
                "GET",
                target.url,
                headers={
                    "Accept-Encoding": "identity",
                    "User-Agent": "qedfuse",
                    **self._credentials.headers_for(target),
                    **headers,
                },
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
        except (HTTPError, OSError) as error:
            raise translated(error) from error

    def _redirected(self, source: Address, location: str) -> Address:
        """Return the target of a redirection, if it is usable and allowed."""
        try:
            # Of a URL, urljoin() would remove a semicolon at the end of the path.
            joined = location if is_url(location) else urljoin(source.url, location)
            target = parse_address(joined.partition("#")[0])
        except UsageError as error:
            msg = f"found a redirection that is not a usable URL ({error})"
            raise UnusableError(msg) from error
        except ValueError as error:
            msg = "found a redirection to something other than a URL"
            raise UnusableError(msg) from error
        if _is_same_host(target, self._address):
            return target
        is_secure = target.scheme == "https" or target.is_loopback or self._options.allow_http
        is_allowed = any(is_below(target, prefix) for prefix in self._options.redirect_prefixes)
        if target.is_web and is_secure and is_allowed:
            return target
        msg = f"found a redirection to {shortened(target.shown, _MAX_SHOWN_CHARACTERS)}, expected "
        if target.is_web and is_secure:
            msg += (
                f"one on the same host (allow it with backing_url={target.scheme}://{target.host}/)"
            )
        else:
            msg += "an https:// URL"
        raise UnusableError(msg)

    def _raise_for_status(self, response: BaseHTTPResponse, target: Address) -> None:
        """Raise the exception for a status, except 200, 206 and 416, which callers handle."""
        status = response.status
        if status in {200, 206, 416}:
            return
        if status == HTTPStatus.PRECONDITION_FAILED:
            raise ChangedError
        if status in {404, 410}:
            raise MissingError
        msg = f"found HTTP status {status}"
        if status in {401, 403, 407}:
            if status == HTTPStatus.UNAUTHORIZED and not self._credentials.headers_for(target):
                msg += f" (found no credentials for the host, expected {HINT})"
            raise RefusedError(msg)
        is_failure = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _PERMANENT_STATUS
        if is_failure or status in _RETRIED_STATUS:
            raise AttemptError(msg)
        msg += ", expected 206"
        raise UnusableError(msg)


def _is_same_host(target: Address, origin: Address) -> bool:
    """Return whether a redirection from ``origin`` to ``target`` stays on its host.

    The port stays the same, or changes with the scheme from that of HTTP to that of HTTPS.
    """
    if (target.scheme, target.host) == (origin.scheme, origin.host):
        return True
    is_upgrade = (origin.scheme, target.scheme) == ("http", "https")
    has_default_ports = (origin.port, target.port) == (80, 443)
    return is_upgrade and has_default_ports and target.hostname == origin.hostname
