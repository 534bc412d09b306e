"""One version of an object, read by ranges: failed attempts are repeated for a limited time."""

from __future__ import annotations

import errno
import math
import random
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

from qedfuse.errors import ObjectChangedError, RemoteError, UsageError
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    Client,
    ClientOptions,
    MissingError,
    RefusedError,
    UnreachableError,
    UnusableError,
)
from qedfuse.remote.libraries import missing_library
from qedfuse.remote.outagelog import closed_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Version
    from qedfuse.remote.options import Deadlines

T = TypeVar("T")

MAX_OBJECT_BYTES: Final = 16 << 40
"""Maximum size of an object: 16 TiB.  The memory for its units (`UNIT_BYTES`) grows with the size:
up to nine bytes for each 256 KiB."""
_FIRST_PAUSE_SECONDS: Final = 0.2
_MAX_PAUSE_SECONDS: Final = 5.0
_BRIEF_SECONDS: Final = 0.5
"""For how long `get_parts` with ``is_brief`` repeats attempts that bring no part.

Not 0: programs that repeat failed reads without a pause would make many requests a second."""


class RemoteObject:
    """One version of an object on a server.

    Threads may read concurrently.

    Attributes:
        address: The address of the object.
        version: The version that is read.
        attempt_seconds: Maximum time of an attempt until its first part has arrived.
        max_seconds: Maximum duration of a call of `get`, and of each part of `get_parts`.
        max_brief_seconds: The same for each part of `get_parts` with ``is_brief``.
    """

    def __init__(
        self, address: Address, client: Client, version: Version, deadlines: Deadlines
    ) -> None:
        """Make an object that reads ``version`` with ``client``; see `open_object`."""
        self.address = address
        self.version = version
        self._client = client
        # Three attempts can add their full time: one that stalls after a part has arrived, because
        # the total time begins again at its end; one that begins at the very end of the total time;
        # and one with renewed credentials.  Each may be followed by a query of the object's
        # version, with the same limit (`WebClient.get`).
        spare_seconds = 3 * 2 * deadlines.attempt_seconds
        self.attempt_seconds = deadlines.attempt_seconds
        self.max_seconds = deadlines.total_seconds + spare_seconds
        self._total_seconds = deadlines.total_seconds
        self._brief_seconds = min(_BRIEF_SECONDS, deadlines.total_seconds)
        self.max_brief_seconds = self._brief_seconds + spare_seconds
        self._closed = threading.Event()

    def get(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes at an offset; see `get_parts`."""
        found: list[Buffer] = []
        self.get_parts(offset, [length], found.append)
        return found[0]

    def get_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        deliver: Callable[[Buffer], object],
        *,
        allocate: Callable[[int], Buffer] = bytearray,
        is_brief: bool = False,
    ) -> None:
        """Fetch adjacent parts with one request; block the thread until all have arrived.

        A failed attempt is repeated from the first part that has not arrived.

        Args:
            offset: The offset of the first part.
            lengths: The length of each part in bytes; all parts lie within the object.
            deliver: Called with each part in order, as soon as the part has arrived.
            allocate: Returns a buffer of a given length for a part.
            is_brief: Whether attempts for a part are repeated for half a second instead of the
                usual time.

        Raises:
            ObjectChangedError: The server now has another version of the object, or no object.
            RemoteError: The server cannot be reached, refuses, or does not serve the range, or
                `close` was called before all parts had arrived.
        """
        done = 0

        def attempt() -> None:
            nonlocal done
            if self._closed.is_set():
                raise closed_error(self.address.shown)
            begun = done
            start = offset + sum(lengths[:begun])
            parts = self._client.get(start, lengths[begun:], self.version, allocate)
            try:
                with closing(parts):
                    for part in parts:
                        done += 1
                        deliver(part)
                        if self._closed.is_set():
                            break
            except (AttemptError, RefusedError):
                if done == begun:
                    raise

        try:
            # The time begins again after each attempt in which a part has arrived.
            while done < len(lengths):
                retry(
                    self.address,
                    attempt,
                    self._client.renew,
                    self._brief_seconds if is_brief else self._total_seconds,
                    self._closed,
                )
        except RemoteError as error:
            if error.errno != errno.ENOENT:
                raise
            # A read of an open file must not fail with ENOENT.
            msg = f"{self.address.shown}: found no such object any more"
            raise ObjectChangedError(msg) from error

    def close(self) -> None:
        """Begin no further attempt; a running one ends after its present part or its deadline."""
        self._closed.set()


def make_client(address: Address, options: ClientOptions) -> Client:
    """Return a client for an address.

    Raises:
        RemoteError: The library for the scheme is not installed, or the credentials or the
            environment are not valid.
        UsageError: The address leads to another machine without TLS, and the options forbid that.
    """
    if address.scheme == "http" and not (address.is_loopback or options.allow_http):
        msg = (
            f"{address.shown}: URL scheme: found http:// to another machine, expected https:// "
            "(allow it with allow_http)"
        )
        raise UsageError(msg)
    try:
        if address.is_web:
            # Imported late: these libraries are optional, and slow to load.
            from qedfuse.remote.webclient import WebClient  # noqa: PLC0415  late, see above

            return WebClient(address, options)
        from qedfuse.remote.storeclient import StoreClient  # noqa: PLC0415  late, see above

        return StoreClient(address, options)
    except ImportError as error:
        # Also raised for a library that is too old.
        msg = f"{address.shown}: {missing_library(is_web=address.is_web)}"
        raise RemoteError(msg, errno.ENOPKG) from error
    except UnusableError as error:
        msg = f"{address.shown}: {error}"
        raise RemoteError(msg, errno.EINVAL) from error


def open_object(
    address: Address, client: Client, deadlines: Deadlines, *, allow_unpinned: bool = False
) -> RemoteObject:
    """Return an object at its present version; block the thread until the server answers.

    Args:
        address: The address of the object.
        client: A client for this address.
        deadlines: How long to wait for the server.
        allow_unpinned: Whether to accept a version of which only the size is known.

    Raises:
        RemoteError: The object is missing or too large, or the server cannot be reached, refuses,
            or reports nothing that distinguishes versions of the object.
    """
    version = retry(
        address,
        client.head,
        client.renew,
        deadlines.total_seconds,
        threading.Event(),
        unreachable_seconds=deadlines.attempt_seconds,
    )
    if version.size > MAX_OBJECT_BYTES:
        msg = f"{address.shown}: found {version.size} bytes, expected at most {MAX_OBJECT_BYTES}"
        raise RemoteError(msg, errno.EFBIG)
    is_pinned = version.validator or address.version or not version.size
    if not is_pinned and not allow_unpinned:
        msg = (
            f"{address.shown}: found neither a strong ETag nor a Last-Modified header, expected one"
            " to notice changes (allow_unpinned reads it nevertheless)"
        )
        raise RemoteError(msg, errno.EINVAL)
    return RemoteObject(address, client, version, deadlines)


def retry(
    address: Address,
    attempt: Callable[[], T],
    renew: Callable[[], object],
    total_seconds: float,
    closed: threading.Event,
    *,
    unreachable_seconds: float = math.inf,
) -> T:
    """Repeat an attempt until it succeeds; return its result.

    Args:
        address: The address of the object.
        attempt: Makes one attempt; raises the exceptions of a client.  It must check ``closed``,
            because it is called with renewed credentials even after ``closed`` is set.
        renew: Called when the server refuses the credentials for the first time; see
            `Client.renew`.  The next refusal is an error.
        total_seconds: The last attempt begins at the end of this time at the latest, apart from one
            with renewed credentials.
        closed: The event that ends the repetition.
        unreachable_seconds: A further limit for attempts that cannot connect.

    Raises:
        ObjectChangedError: The server has another version of the object.
        RemoteError: No attempt succeeded.
    """
    begin = time.monotonic()
    # None until the credentials are read again.  Then the reason if that failed, or "".
    renewal: str | None = None
    pause = _FIRST_PAUSE_SECONDS
    number = 1
    while True:
        try:
            return attempt()
        except MissingError as error:
            msg = f"{address.shown}: found no such {str(error) or 'object'}"
            raise RemoteError(msg, errno.ENOENT) from error
        except ChangedError as error:
            msg = f"{address.shown}: found another version of the object than the one in use"
            raise ObjectChangedError(msg) from error
        except UnusableError as error:
            msg = f"{address.shown}: {error}"
            raise RemoteError(msg) from error
        except RefusedError as error:
            # Temporary credentials expire, and the credentials file may have been replaced.
            if renewal is not None:
                msg = f"{address.shown}: refused: {error}" + (renewal and f" ({renewal})")
                raise RemoteError(msg, errno.EACCES) from error
            renewal = _renewal_failure(renew)
            number += 1
            continue
        except AttemptError as error:
            seconds = total_seconds
            if isinstance(error, UnreachableError):
                seconds = min(seconds, unreachable_seconds)
            left = begin + seconds - time.monotonic()
            # Random, so that machines do not all repeat requests at the same moment.
            wait = min(pause * random.uniform(0.5, 1), left)  # noqa: S311  no secret
            if left <= 0 or closed.wait(wait):
                msg = f"{address.shown}: {error} (attempts: {number})"
                raise RemoteError(msg) from error
        number += 1
        pause = min(_MAX_PAUSE_SECONDS, 2 * pause)


def _renewal_failure(renew: Callable[[], object]) -> str:
    """Read the credentials again; return the reason of a failure, or an empty string."""
    try:
        renew()
    except UnusableError as error:
        # The former credentials are used once more, because this failure may be temporary.
        return str(error)
    return ""
