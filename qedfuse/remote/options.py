"""The options for reading files on servers; this module loads no library for servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from qedfuse.util.durations import parse_duration

if TYPE_CHECKING:
    from qedfuse.remote.address import Address

MIN_CACHE_BYTES: Final = 1 << 20
"""Minimum value of ``RemoteOptions.cache_bytes``."""
_MAX_DEADLINE_SECONDS: Final = 86400.0
"""Maximum of each time in `Deadlines` that a user gives."""


def parse_deadline(text: str) -> float:
    """Return the number of seconds in the text of an option for a time in `Deadlines`.

    Raises:
        UsageError: The text is not a number of seconds, or the number is 0 or too large.
    """
    return parse_duration(text, _MAX_DEADLINE_SECONDS)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long to wait for a server.

    Attributes:
        connect_seconds: Maximum time to connect.
        attempt_seconds: Maximum time of one attempt, connecting included.  For an NBD server:
            maximum time of the handshake, and of a wait for the next byte of a reply.
        total_seconds: For how long failed attempts are repeated; the last one may end later.  A
            read from an NBD server fails after this time, even during an attempt.
    """

    connect_seconds: float = 5.0
    attempt_seconds: float = 10.0
    total_seconds: float = 60.0

    @classmethod
    def limited(cls, connect_seconds: float, attempt_seconds: float, total_seconds: float) -> Self:
        """Return the given times, none greater than the next: a greater one is reduced."""
        attempt_seconds = min(attempt_seconds, total_seconds)
        return cls(min(connect_seconds, attempt_seconds), attempt_seconds, total_seconds)


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How remote files are read.

    Attributes:
        cache_directory: The directory of the cache; None for the default directory of the user.
        cache_bytes: Maximum disk space of the cache; None for no maximum.
        deadlines: How long to wait for a server.
        allow_http: Whether ``http://`` is allowed to other machines.
        allow_unpinned: Whether to read a file whose version the server does not report.  A change
            of such a file is noticed only if the size changes.
        allowed: The prefixes of the URLs that images may name as backing files, and to which web
            servers may redirect.
        credentials: Name and value of each variable in the credentials file.  They take precedence
            over those of the environment.
        credentials_file: The file from which ``credentials`` were read, and are read again when a
            server refuses them; None for no file.
    """

    cache_directory: str | None = None
    cache_bytes: int | None = None
    deadlines: Deadlines = field(default_factory=Deadlines)
    allow_http: bool = False
    allow_unpinned: bool = False
    allowed: tuple[Address, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    credentials_file: str | None = None
