"""What a client of an object store or a web server does: ask for an object's version, read a range.

A client makes one attempt for each call, and blocks the thread.  `qedfuse.remote.object` repeats
attempts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.errors import QedError
from qedfuse.remote.credentials import read_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address

_STRONG_SECONDS: Final = 2.0
"""After this time, another change of an object has another time in Last-Modified (RFC 9110)."""
_MAX_QUERIES: Final = 5


@dataclass(frozen=True, slots=True)
class Version:
    """A version of an object, by which its content is known.

    Attributes:
        size: Length of the object in bytes.
        etag: The strong entity tag (RFC 9110); empty if there is none.
        modified: Time of the last change in seconds since 1970; None if the server does not say.
    """

    size: int
    etag: str = ""
    modified: float | None = None

    @property
    def validator(self) -> str:
        """What distinguishes the version from others of the object; empty if nothing does."""
        if self.etag:
            return f"etag {self.etag}"
        return "" if self.modified is None else f"modified {self.modified:.0f}"

    def is_same(self, other: Version) -> bool:
        """Return whether the content is the same, as far as size and validator show.

        With an entity tag, the time does not count: servers of one object may differ in it.
        """
        return (self.size, self.validator) == (other.size, other.validator)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a client connects.

    Attributes:
        connect_seconds: Maximum time to connect.
        attempt_seconds: Maximum time of one attempt, connecting included.
        allow_http: Whether ``http://`` is allowed to other machines.
        redirect_prefixes: Where a web server may redirect to, besides its own host.
        credentials: Variables as in the environment, which they replace.
        credentials_file: The file from which ``credentials`` were read, and are read again when a
            server refuses them; None for no file.
    """

    connect_seconds: float = 5.0
    attempt_seconds: float = 10.0
    allow_http: bool = False
    redirect_prefixes: tuple[Address, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    credentials_file: str | None = None

    def renewed(self) -> ClientOptions:
        """Return the options with what the file of credentials has now.

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
    """An attempt failed, and another one may succeed.

    The message is the reason, without the name of the object.
    """


class UnreachableError(AttemptError):
    """No connection to the server was made: its name is unknown, or nothing answers there."""


class RefusedError(AttemptError):
    """The server refuses the credentials, which may have expired."""


class MissingError(Exception):
    """The server has no such object, or has not what the message names."""


class ChangedError(Exception):
    """The server has another version of the object than the one that was asked for."""


class UnusableError(Exception):
    """The server cannot serve the object in the way that is needed.

    The message is the reason: what was found and what was expected.
    """


class Client(Protocol):
    """Reads one object.  Threads may use a client concurrently.

    Every method raises the exceptions of this module only.
    """

    @property
    def store_id(self) -> str:
        """The store that the URL belongs to, without secrets; empty if the URL itself names it."""

    def head(self) -> Version:
        """Return the object's present version."""

    def get(self, offset: int, length: int, version: Version) -> Buffer:
        """Return ``length`` bytes of a version of the object, which has all of these bytes.

        Raises:
            ChangedError: The server has another version, whatever the server says about it.
        """

    def renew(self) -> None:
        """Read the credentials again before the next attempt."""


def settled_version(query: Callable[[], tuple[Version, float | None]]) -> Version:
    """Return the present version of an object, as soon as its validator can be relied on.

    A time of the last change counts whole seconds.  An object without a strong entity tag that was
    just changed could be changed again in the same second, and nothing would show it.  So such an
    object is asked for again, until it has stayed unchanged for a while.

    Args:
        query: Asks the server; returns the version, and how many seconds ago it was made, or None
            if that is unknown.

    Raises:
        AttemptError: The object changes again and again.
        Exception: What ``query`` raises.
    """
    version, seconds = query()
    for _ in range(_MAX_QUERIES):
        is_old = seconds is not None and seconds >= _STRONG_SECONDS
        if version.etag or version.modified is None or is_old:
            return version
        time.sleep(_STRONG_SECONDS)
        former = version
        version, seconds = query()
        if version.is_same(former):
            return version
    msg = "found changes every few seconds and no strong ETag, expected the object to stay"
    raise AttemptError(msg)
