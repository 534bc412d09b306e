"""What a client of an object store or a web server does: ask for an object's version, read a range.

A client makes one attempt for each call, and blocks the thread.  `qedfuse.remote.object` repeats
attempts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address


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
    """

    connect_seconds: float = 5.0
    attempt_seconds: float = 10.0
    allow_http: bool = False
    redirect_prefixes: tuple[Address, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)


class AttemptError(Exception):
    """An attempt failed, and another one may succeed.

    The message is the reason, without the name of the object.
    """


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

    def head(self) -> Version:
        """Return the object's present version."""

    def get(self, offset: int, length: int, version: Version) -> Buffer:
        """Return ``length`` bytes of a version of the object, which has all of these bytes.

        Raises:
            ChangedError: The server has another version, whatever the server says about it.
        """

    def renew(self) -> None:
        """Read the credentials again before the next attempt."""
