"""Comparing a stored object with the content of its upload, by checksums of the parts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.errors import RemoteError
from qedfuse.remote.object import RemoteObject, make_client, open_object
from qedfuse.remote.options import Deadlines

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions, Version

MAX_PART_SECONDS: Final = 600.0
"""Maximum time to send one part.  So four parts of 64 MiB that are sent concurrently need at least
437 KiB/s."""
_COMPARE_BYTES: Final = 1 << 20
"""A part is read in steps of this length.  After each step, a comparison looks whether it must
end."""
_READ_SECONDS: Final = 60.0
"""Maximum time of an attempt to read a part.  The next attempt continues with the first step that
has not arrived."""
_READ_RETRY_SECONDS: Final = 600.0
"""For how long attempts in which no step arrives are repeated."""
_RETRY_SECONDS: Final = 30.0
"""For how long a failed request for the metadata is repeated."""


class StoppedError(Exception):
    """The upload was stopped; `Upload.remains` is what it has left in the store."""


class DifferentError(RemoteError):
    """The store has an object that differs from the content."""


class UploadCheck:
    """Compares an object with the content of an upload."""

    def __init__(
        self,
        address: Address,
        size: int,
        options: ClientOptions,
        part_bytes: int,
        digests: list[bytes],
        *,
        progress: Callable[[int, int], object],
        stopped: threading.Event,
    ) -> None:
        """Prepare to compare the object at ``address`` with content of ``size`` bytes.

        Args:
            address: The address of the object in a store.
            size: Length of the content in bytes.
            options: How to connect.
            part_bytes: Length in bytes of each part of the content, except the last.
            digests: The MD5 checksum of each part; the caller fills the list before `compare`.
            progress: Called with the number of bytes compared, and the size; not called if the
                entity tag shows that the object is equal.
            stopped: Another thread sets the event to end the comparison.
        """
        self._address = address
        self._size = size
        self._options = options
        self._part_bytes = part_bytes
        self._digests = digests
        self._progress = progress
        self._stopped = stopped

    def open(self) -> RemoteObject:
        """Return the object that the store has now.

        Raises:
            RemoteError: See `make_client` and `open_object`.
            UsageError: See `make_client`.
        """
        client = make_client(self._address, self._options)
        return open_object(
            self._address, client, Deadlines(total_seconds=_RETRY_SECONDS), allow_unpinned=True
        )

    def compare(self, etag: str, *, is_stoppable: bool = True) -> str:
        """Compare the object with the content; return the entity tag of the object.

        An object of another length or with another entity tag than ``etag`` differs.  In most
        stores the tag is a checksum of the object.  If it is not the checksum of the content, the
        object is read and compared.

        Args:
            etag: The entity tag that the store has returned for the upload; empty if unknown, or if
                the tag is weak.
            is_stoppable: Whether to raise StoppedError if ``stopped`` is set.

        Raises:
            DifferentError: The object differs.
            RemoteError: The object is missing, or cannot be read.
            StoppedError: The upload was stopped.
        """
        if is_stoppable and self._stopped.is_set():
            raise StoppedError
        source = self.open()
        found = source.version
        if found.size != self._size:
            msg = f"{self._address.shown}: found {found.size} bytes stored, expected {self._size}"
            raise DifferentError(msg)
        if etag and found.etag not in {etag, ""}:
            msg = f"{self._address.shown}: found another object than the one that was stored"
            raise DifferentError(msg)
        if found.etag.strip('"') not in self._expected_etags():
            self._compare_content(found, is_stoppable=is_stoppable)
        if is_stoppable and self._stopped.is_set():
            raise StoppedError
        return found.etag

    def _expected_etags(self) -> tuple[str, str]:
        """Return the possible entity tags of S3 for the content: stored in parts, and stored whole.

        The tag for an object in parts is the MD5 checksum of the checksums of its parts, with the
        number of parts.  Only content of a single part is ever stored whole.
        """
        digests = b"".join(self._digests)
        of_parts = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(self._digests)}"
        return of_parts, self._digests[0].hex() if len(self._digests) == 1 else of_parts

    def _compare_content(self, version: Version, *, is_stoppable: bool) -> None:
        """Read a version of the object, and compare it with the content."""
        # The client of a store limits the time of a whole response, and here a response can contain
        # a whole part.  So the limit is higher than the default.  It is lower than the limit for
        # sending a part, so that a response that stalls is soon requested again.
        options = replace(self._options, attempt_seconds=_READ_SECONDS)
        client = make_client(self._address, options)
        source = RemoteObject(
            self._address, client, version, Deadlines(total_seconds=_READ_RETRY_SECONDS)
        )
        for number, start in enumerate(range(0, self._size, self._part_bytes)):
            length = min(self._part_bytes, self._size - start)
            found = hashlib.md5(usedforsecurity=False)

            def add(block: Buffer, found: hashlib._Hash = found) -> None:
                if is_stoppable and self._stopped.is_set():
                    raise StoppedError
                found.update(block)

            steps = range(0, length, _COMPARE_BYTES)
            source.get_parts(start, [min(_COMPARE_BYTES, length - step) for step in steps], add)
            if found.digest() != self._digests[number]:
                msg = f"{self._address.shown}: found other bytes stored at {start}, expected the "
                msg += "content of the file"
                raise DifferentError(msg)
            self._progress(start + length, self._size)
