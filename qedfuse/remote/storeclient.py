"""A client for object stores (S3, Google Cloud Storage, Azure) that uses obstore.

obstore hangs in a child process that is forked after its first use, so `make_store` refuses to make
a store there.  A mount must become a daemon before it makes a client.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError

from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnusableError,
    Version,
    settled_version,
)
from qedfuse.remote.storeerrors import translated, translating
from qedfuse.remote.storesettings import make_store

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from obstore import GetOptions, GetResult, ObjectMeta

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions


class StoreClient:
    """Reads one object of an object store."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        """Make a client for the object at ``address``; no connection is made yet.

        Raises:
            UnusableError: The environment or the credentials configure no usable store.
        """
        self._address = address
        self._options = options
        self._store = make_store(address, options)

    @property
    def store_id(self) -> str:
        """The endpoint or account that has the bucket."""
        return self._store.store_id

    def head(self) -> Version:
        """Return the object's present version."""
        return settled_version(self._query)

    def _query(self) -> tuple[Version, None]:
        """Return the present version, and None: how long it has been unchanged is unknown."""
        options: GetOptions = {"head": True}
        try:
            return self._version(self._get(options)), None
        except (MissingError, RefusedError, UnusableError):
            # The response to a HEAD has no body; that to a GET names what is missing or refused.
            try:
                return self._version(self._get({"range": (0, 1)})), None
            except ChangedError:
                # Status 416: only an empty object has no first byte.
                return self._version(self._get({})), None

    def get(
        self,
        offset: int,
        lengths: Sequence[int],
        version: Version,
        allocate: Callable[[int], Buffer] = bytearray,  # noqa: ARG002  obstore makes the buffers
    ) -> Generator[Buffer]:
        """Yield adjacent parts of a version of the object; see `Client.get`."""
        options: GetOptions = {"range": (offset, offset + sum(lengths))}
        if version.etag:
            options["if_match"] = version.etag
        elif version.modified is not None:
            options["if_unmodified_since"] = datetime.fromtimestamp(version.modified, UTC)
        result = self._get(options)
        # The server may ignore the condition, so the version in the response is compared as well.
        if not self._version(result).is_same(version):
            raise ChangedError
        # Also for one part not `GetResult.bytes`, which collects a response of any length.
        yield from _cut(self._blocks(result, lengths[0]), lengths)

    def _blocks(self, result: GetResult, min_bytes: int) -> Iterator[memoryview]:
        """Yield the content of a response in blocks, as they arrive.

        Each block except the last has at least ``min_bytes``.
        """
        with translating(self._store.identity):
            stream = iter(result.stream(min_chunk_size=min_bytes))
        while True:
            with translating(self._store.identity):
                block = next(stream, None)
            if block is None:
                return
            yield memoryview(block)

    def _version(self, result: GetResult) -> Version:
        """Return the version of the object of a response."""
        with translating(self._store.identity):
            return version_of(result.meta)

    def renew(self) -> None:
        """Configure the store again, with the present credentials.

        Raises:
            UnusableError: The environment or the credentials configure no usable store.
        """
        self._options = self._options.renewed()
        self._store = make_store(self._address, self._options)

    def _get(self, options: GetOptions) -> GetResult:
        if self._address.version:
            options["version"] = self._address.version
        with translating(self._store.identity):
            try:
                return obstore.get(self._store.handle, self._address.key, options=options)
            except AlreadyExistsError as error:
                # Status 409, which Swift gives for an object whose parts it cannot read now.
                raise AttemptError(str(translated(error))) from error


def _cut(blocks: Iterator[memoryview], lengths: Sequence[int]) -> Iterator[Buffer]:
    """Cut blocks into parts of the given lengths; refuse blocks of another total length."""
    rest = memoryview(b"")
    found = 0
    for number, length in enumerate(lengths):
        pieces: list[memoryview] = []
        missing = length
        while missing:
            if not rest:
                rest = next(blocks, rest)
                found += len(rest)
            if not rest:
                break
            pieces.append(rest[:missing])
            missing -= len(pieces[-1])
            rest = rest[len(pieces[-1]) :]
        is_longer = number == len(lengths) - 1 and bool(rest or next(blocks, b""))
        if missing or is_longer:
            msg = f"found {'more than ' * is_longer}{found - len(rest)} bytes, "
            msg += f"expected {sum(lengths)}"
            raise AttemptError(msg)
        yield pieces[0] if len(pieces) == 1 else b"".join(pieces)


def version_of(meta: ObjectMeta) -> Version:
    """Return the version that the metadata of an object describe."""
    return Version(meta["size"], strong_etag(meta["e_tag"]), meta["last_modified"].timestamp())


def strong_etag(etag: str | None) -> str:
    """Return an entity tag; an empty string for no tag or a weak tag.

    A weak tag can be equal for contents that differ.
    """
    return "" if etag is None or etag.startswith("W/") else etag
