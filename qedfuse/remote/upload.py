"""Storing a file as one object of a store, in parts."""

from __future__ import annotations

import errno
import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError

from qedfuse.errors import RemoteError, UsageError
from qedfuse.remote.object import retry
from qedfuse.remote.storeclient import strong_etag
from qedfuse.remote.storedobject import StoredObject
from qedfuse.remote.storeerrors import (
    ERRORS,
    code_of,
    panics_translated,
    translated,
    translating,
)
from qedfuse.remote.storesettings import Store, make_store
from qedfuse.remote.uploadcheck import MAX_PART_SECONDS, StoppedError, UploadCheck
from qedfuse.remote.uploadcontent import ContentParts

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions
    from qedfuse.remote.storedobject import Remains
    from qedfuse.remote.uploadcontent import Content

_log = logging.getLogger(__name__)

_MAX_PARALLEL_PARTS: Final = 4
_RETRY_SECONDS: Final = 60.0
"""The default of ``retry_seconds`` of `Upload`."""
_NOT_IMPLEMENTED: Final = "NotImplemented"
"""The error code of a store that does not support conditional puts."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The result of an upload.

    Attributes:
        size: Length of the object in bytes.
        version: The version of the object; empty if the store did not report one.
    """

    size: int
    version: str


class Upload:
    """One upload.  `run` must be called only once; another thread may call `stop` at any time."""

    def __init__(
        self,
        address: Address,
        content: Content,
        size: int,
        options: ClientOptions,
        *,
        overwrite: bool,
        progress: Callable[[int, int], object] | None,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        """Prepare to store ``size`` bytes of ``content`` as the object at ``address``.

        Args:
            address: The address of the object in a store.
            content: The content to store.
            size: Length of the content in bytes.
            options: How to connect.
            overwrite: Whether to replace an object that exists.
            progress: Called with the number of bytes that were uploaded, and ``size``.  A
                comparison after the upload counts its bytes from 0 again.
            retry_seconds: For how long a request with content is repeated if it fails.
        """
        self._address = address
        self._size = size
        self._options = options
        self._overwrite = overwrite
        self._on_progress = progress
        self._retry_seconds = retry_seconds
        self._steps = 0
        self._stopped = threading.Event()
        # Another program may store the object during the upload.  So `before_end`, called when all
        # parts were read, looks for the object again.
        self._parts = ContentParts(
            *(content, size, address.shown),
            before_end=self._refuse_existing,
            progress=self._report,
            stopped=self._stopped,
        )
        self._check = UploadCheck(
            *(address, size, options, self._parts.part_bytes, self._parts.digests),
            progress=self._report,
            stopped=self._stopped,
        )
        self._stored = StoredObject(address.key, self._check, overwrite=overwrite)
        self._has_begun = False

    @property
    def remains(self) -> Remains:
        """What the store has after the end of `run`: `Remains.OBJECT` after a success."""
        return self._stored.remains

    @property
    def steps(self) -> int:
        """Number of reports of progress so far; the upload of a single part makes none."""
        return self._steps

    @property
    def has_begun(self) -> bool:
        """Whether `run` may have read the content and stored a part of it.

        If the value is false after `stop`, `run` reads and stores nothing.
        """
        return self._has_begun

    def stop(self) -> None:
        """Make `run` end soon with `StoppedError`, or with its result if it has nearly ended.

        Before StoppedError, `run` removes what it has stored.  It cannot do so if the store does
        not answer or has given the object no entity tag.  With ``overwrite`` it keeps a complete
        object.  See `remains`.
        """
        self._stopped.set()

    def run(self) -> Uploaded:
        """Store the content, then compare the stored object with the content; block the thread.

        Raises:
            UsageError: There is an object, and ``overwrite`` is false.
            RemoteError: The store cannot be reached, refuses, or has other content afterwards.  The
                object may exist if the message says so.
            QedError: The content cannot be read or has changed, or no thread can be started.
            StoppedError: `stop` was called.
        """
        self._refuse_existing()
        store: Store = self._call_store(lambda: self._make_store(self._options))

        def renew() -> None:
            nonlocal store
            self._warn_of_restart()
            store = self._make_store(self._options.renewed())

        try:
            seconds = self._retry_seconds if self._parts.is_single else 0.0
            result = self._call_store(lambda: self._put(store), renew, seconds)
        except (RemoteError, UsageError) as error:
            if not self._parts.is_read_to_end:
                self._stored.raise_failure(error, has_parts=self._has_sent_parts)
            self._stored.verify_after_failure(store, error, has_parts=self._has_sent_parts)
            return Uploaded(self._size, "")
        self._stored.compare_or_delete(store, strong_etag(result["e_tag"]))
        return Uploaded(self._size, result["version"] or "")

    @property
    def _has_sent_parts(self) -> bool:
        """Whether parts were sent that obstore must remove if the upload fails."""
        return not self._parts.is_single and bool(self._parts.digests)

    def _report(self, done: int, total: int) -> None:
        """Count a part, and report the progress."""
        self._steps += 1
        if self._on_progress is not None:
            self._on_progress(done, total)

    def _make_store(self, options: ClientOptions) -> Store:
        """Return the store for an upload with the credentials of ``options``."""
        part_options = replace(options, attempt_seconds=MAX_PART_SECONDS)
        # obstore repeats the requests for parts.  A single request is repeated by `_call_store`,
        # because obstore would also repeat a conditional put that the store does not support.
        seconds = 0.0 if self._parts.is_single else self._retry_seconds
        return make_store(self._address, part_options, retry_seconds=seconds, read_keys_again=True)

    def _warn_of_restart(self) -> None:
        """Log that the store refused the credentials, if parts were sent before."""
        if self._has_sent_parts:
            # With refused credentials obstore cannot remove these parts, and does not report that.
            _log.warning(
                "%s: the store refused the credentials during the upload, which begins again; "
                "parts of the first upload may be left in the store",
                self._address.shown,
            )

    def _put(self, store: Store) -> Any:  # noqa: ANN401  obstore's PutResult cannot be imported
        """Store content of one part with one request, and longer content in several parts.

        Only a single request can have the condition that there is no object yet.
        """
        # Set before the check: another thread calls `stop`, and then reads `has_begun`.
        self._has_begun = True
        if self._stopped.is_set():
            raise StoppedError
        self._parts.restart()
        if self._parts.is_single:
            block = self._parts.read_single()
            if not self._overwrite:
                try:
                    with panics_translated():
                        return self._put_short(store, block, "create")
                except AlreadyExistsError:
                    raise self._exists() from None
                except ERRORS as error:
                    if code_of(error) != _NOT_IMPLEMENTED:
                        raise translated(error, store.identity) from error
            with translating(store.identity):
                return self._put_short(store, block, "overwrite")
        with translating(store.identity):
            return obstore.put(
                store.handle,
                self._address.key,
                self._parts.read(),
                chunk_size=self._parts.part_bytes,
                max_concurrency=_MAX_PARALLEL_PARTS,
                use_multipart=True,
            )

    def _put_short(self, store: Store, block: bytearray, mode: Any) -> Any:  # noqa: ANN401
        """Store content of one part with one request; ``mode`` is that of ``obstore.put``."""
        return obstore.put(
            store.handle, self._address.key, bytes(block), mode=mode, use_multipart=False
        )

    def _refuse_existing(self) -> None:
        """Raise a UsageError if there is an object that the upload may not replace."""
        if self._overwrite:
            return
        try:
            self._check.open()
        except RemoteError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        raise self._exists()

    def _exists(self) -> UsageError:
        return UsageError(
            f"{self._address.shown}: found an object, expected none (--force replaces it)"
        )

    def _call_store(
        self,
        call: Callable[[], Any],
        renew: Callable[[], object] = lambda: None,
        total_seconds: float = 0.0,
    ) -> Any:  # noqa: ANN401  what the call returns
        """Call a function; raise the errors of `retry` instead of the exceptions of a client.

        After refused credentials, ``renew`` reads them again, and the function is called once more.
        If the store does not answer, the call is repeated for ``total_seconds``, or until `stop`.
        """
        return retry(self._address, call, renew, total_seconds, self._stopped)
