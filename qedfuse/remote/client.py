"""The interface of clients of object stores and web servers: ask for a version, read a range.

Each call blocks the calling thread.  A client does not repeat a request that failed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.errors import QedError
from qedfuse.remote.credentials import read_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address

_STRONG_SECONDS: Final = 2.0
"""Minimum age at which a Last-Modified time identifies the version (RFC 9110, 8.8.2.2)."""
_MAX_FURTHER_QUERIES: Final = 5
"""Maximum number of further queries for a version whose validator does not identify it yet."""


@dataclass(frozen=True, slots=True)
class Version:
    """Identifies one version of the content of an object.

    Attributes:
        size: Length of the object in bytes.
        etag: The strong entity tag (RFC 9110); empty if there is none.
        modified: Time of the last change in seconds since 1970; None if the server reports none.
    """

    size: int
    etag: str = ""
    modified: float | None = None

    @property
    def validator(self) -> str:
        """The entity tag, or the time if there is no tag; empty if the server reports neither."""
        if self.etag:
            return f"etag {self.etag}"
        return "" if self.modified is None else f"modified {self.modified:.0f}"

    def is_same(self, other: Version) -> bool:
        """Return whether the content is the same, as far as size and validator show.

        If there is an entity tag, the time is ignored: servers may report different times.
        """
        return (self.size, self.validator) == (other.size, other.validator)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client connects.

    Attributes:
        connect_seconds: Maximum time to connect.
        attempt_seconds: Maximum time of one attempt, connecting included.
        allow_http: Whether plain ``http://`` is allowed for machines other than this one.
        redirect_prefixes: Prefixes to which a web server may redirect, besides its own host.
        credentials: The variables in the credentials file, which override the environment.
        credentials_file: The file of ``credentials``, which is read again when a server refuses
            them; None for no file.
    """

    connect_seconds: float = 5.0
    attempt_seconds: float = 10.0
    allow_http: bool = False
    redirect_prefixes: tuple[Address, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    credentials_file: str | None = None

    def renewed(self) -> ClientOptions:
        """Return the options with the present content of the credentials file.

        Raises:
            UnusableError: The file cannot be read, or its content is not valid.
        """
        if self.credentials_file is None:
            return self
        try:
            return replace(self, credentials=read_credentials(self.credentials_file))
        except QedError as error:
            raise UnusableError(str(error)) from error


class AttemptError(Exception):
    """An attempt failed, and another one may succeed; the message is only the reason."""


class UnreachableError(AttemptError):
    """No connection to the server was made, because the name lookup, TCP or TLS failed."""


class RefusedError(AttemptError):
    """The server refuses the credentials, which may have expired, or demands credentials."""


class MissingError(Exception):
    """The server has no such object, or no such bucket if the message is ``bucket``."""


class ChangedError(Exception):
    """The server has another version of the object than the requested one."""


class UnusableError(Exception):
    """The server or the configuration makes the object unreadable; retries do not help."""


def certificate_message(found: str) -> str:
    """Return the message about a server's certificate; ``found`` says what is wrong with it."""
    return (
        f"TLS: certificate: found {found}, expected one that is trusted and valid for the host "
        "(SSL_CERT_FILE can name a file with further certificates)"
    )


class Client(Protocol):
    """Reads one object.  Threads may use a client concurrently.

    Every method raises the exceptions of this module only.
    """

    @property
    def store_id(self) -> str:
        """The endpoint or account of the store, without secrets; empty if the URL names it."""

    def head(self) -> Version:
        """Ask the server for the object's present version; return the version."""

    def get(
        self,
        offset: int,
        lengths: Sequence[int],
        version: Version,
        allocate: Callable[[int], Buffer] = bytearray,
    ) -> Generator[Buffer]:
        """Fetch adjacent parts of a version of the object with one request; yield each part.

        Each part is yielded as soon as it has arrived.  The time limit of an attempt applies to
        each part separately, if the library of the client permits that.

        Args:
            offset: The offset of the first part in the object.
            lengths: The length of each part in bytes; all parts lie within the object.
            version: The version.
            allocate: Returns a buffer of a given length for a part, if the client needs one.

        Raises:
            ChangedError: The server has another version.  It reports this, or ignores the condition
                in the request (such as If-Match) and sends bytes of that version.
        """

    def renew(self) -> None:
        """Read the credentials again, for the next attempt."""


def settled_version(query: Callable[[], tuple[Version, float | None]]) -> Version:
    """Return the present version of an object; wait until its validator identifies the version.

    The time of the last change has a resolution of one second, so an object that has just changed
    could change again without a new time.  If there is no entity tag, the object is queried again
    until it has been unchanged for two seconds.

    Args:
        query: Asks the server; returns the version, and for how many seconds the object has been
            unchanged, or None if that is unknown.

    Raises:
        AttemptError: Each query found another version than the query before it.
        Exception: An exception of ``query``.
    """
    version, seconds = query()
    for _ in range(_MAX_FURTHER_QUERIES):
        is_old = seconds is not None and seconds >= _STRONG_SECONDS
        if version.etag or version.modified is None or is_old:
            return version
        time.sleep(_STRONG_SECONDS)
        former = version
        version, seconds = query()
        if version.is_same(former):
            return version
    msg = "found changes every few seconds and no strong ETag, expected the object unchanged"
    raise AttemptError(msg)
