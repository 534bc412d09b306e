"""Storing a file as one object of a store, in parts."""

from __future__ import annotations

import enum
import errno
import hashlib
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError

from qedfuse.errors import HostError, RemoteError, UsageError
from qedfuse.remote.client import AttemptError, RefusedError, UnusableError
from qedfuse.remote.object import retry
from qedfuse.remote.storeerrors import (
    ERRORS,
    code_of,
    panics_translated,
    translated,
    translating,
)
from qedfuse.remote.storesettings import Store, make_store
from qedfuse.remote.uploadcheck import DifferentError, StoppedError, UploadCheck
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions

_log = logging.getLogger(__name__)

_MIN_PART_BYTES: Final = 8 << 20
_LONG_PART_BYTES: Final = 64 << 20
"""Maximum length of a part, unless the content has more than `_MAX_PARTS` parts of this length."""
_MAX_PARTS_EVERYWHERE: Final = 1_000
"""Maximum number of parts that every store accepts.  Swift has this limit; most stores accept
`_MAX_PARTS`."""
_MAX_PARTS: Final = 10_000
_MAX_PARALLEL_PARTS: Final = 4
_MAX_PART_SECONDS: Final = 600.0
"""Maximum time for one part.  Four concurrent parts need at least 55 KiB/s if each has 8 MiB, and
437 KiB/s if each has 64 MiB."""
_RETRY_SECONDS: Final = 60.0
"""The default of ``retry_seconds`` of `Upload`."""
_DRAIN_SECONDS: Final = 3.0
"""How long running parts may go on before a failed upload is aborted."""
MAY_REMAIN: Final = "; the store may still have the object or parts of it"
"""The end of an error message if the store has not confirmed that the upload was removed."""
_NOT_IMPLEMENTED: Final = "NotImplemented"
"""The error code of a store that does not support conditional puts."""


class Content(Protocol):
    """The content of an upload."""

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from an offset; return how many bytes were read.

        Raises:
            QedError: The content cannot be read, or has changed.
        """


class Remains(enum.Enum):
    """What an upload that has ended without a result has left in the store."""

    NOTHING = enum.auto()
    """Nothing, as far as the upload knows: obstore does not report whether parts were removed."""
    UNKNOWN = enum.auto()
    """The object, parts of it, or nothing: the store did not confirm the removal."""
    OBJECT = enum.auto()
    """The complete object."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The result of an upload.

    Attributes:
        size: Length of the object in bytes.
        version: The version of the object; empty if the store keeps no versions.
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
            address: An address of a store.
            content: The content to store.
            size: Length of the content in bytes.
            options: How to connect.
            overwrite: Whether to replace an object that exists.
            progress: Called with a number of bytes and ``size``.  An upload in several parts
                reports how many bytes obstore has taken.  If the comparison after the upload must
                read the object, it reports how many bytes were compared.  The number then begins
                again at the first part.
            retry_seconds: For how long a request that sends content is repeated if it fails.
        """
        self._address = address
        self._content = content
        self._size = size
        self._options = options
        self._overwrite = overwrite
        self._on_progress = progress
        self._retry_seconds = retry_seconds
        self._steps = 0
        self._stopped = threading.Event()
        self._part_bytes = part_bytes(size)
        self._is_in_parts = size > self._part_bytes
        self._digests: list[bytes] = []
        self._check = UploadCheck(
            *(address, size, options, self._part_bytes, self._digests),
            progress=self._report,
            stopped=self._stopped,
        )
        self._is_read_to_end = False  # if true, the store may have made the object
        self._has_begun = False
        self._remains = Remains.NOTHING

    @property
    def remains(self) -> Remains:
        """What the store has after the end of `run`: `Remains.OBJECT` after a success."""
        return self._remains

    @property
    def steps(self) -> int:
        """Number of parts that were passed to obstore or compared so far."""
        return self._steps

    @property
    def has_begun(self) -> bool:
        """Whether the content may have been read, and the store may have a part of it.

        If the value is false after `stop`, `run` does not read the content, and stores nothing.
        """
        return self._has_begun

    def stop(self) -> None:
        """Make `run` end soon with `StoppedError`, or with its result if it has nearly ended.

        `run` removes what it has stored, except in three cases: the store does not answer, the
        object is complete and was allowed to replace another one, or the store has given the
        object no entity tag.  See `remains`.
        """
        self._stopped.set()

    def run(self) -> Uploaded:
        """Store the content, then compare the stored object with the content; block the thread.

        Raises:
            UsageError: There is an object, and ``overwrite`` is false.
            RemoteError: The store cannot be reached, refuses, or has other content afterwards.  If
                the store does not answer after the upload, the object may exist, as the message
                says.
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
            seconds = 0.0 if self._is_in_parts else self._retry_seconds
            result = self._call_store(lambda: self._put(store), renew, seconds)
        except (RemoteError, UsageError) as error:
            if not self._is_read_to_end:
                self._raise_with_parts(error)
            self._verify_after_failure(store, error)
            self._remains = Remains.OBJECT
            return Uploaded(self._size, "")
        self._compare_or_delete(store, result["e_tag"] or "")
        self._remains = Remains.OBJECT
        return Uploaded(self._size, result["version"] or "")

    def _report(self, done: int, total: int) -> None:
        """Count a part, and report the progress."""
        self._steps += 1
        if self._on_progress is not None:
            self._on_progress(done, total)

    def _make_store(self, options: ClientOptions) -> Store:
        """Return the store for an upload with the credentials of ``options``.

        Raises:
            UnusableError: The variables of the credentials file or of the environment configure no
                usable store.
        """
        part_options = replace(options, attempt_seconds=_MAX_PART_SECONDS)
        # obstore repeats the requests for parts.  A single request is repeated by `_call_store`
        # instead, because obstore would also repeat a conditional put that the store does not
        # support.
        seconds = self._retry_seconds if self._is_in_parts else 0.0
        return make_store(self._address, part_options, retry_seconds=seconds, read_keys_again=True)

    def _warn_of_restart(self) -> None:
        """Log that the store refused the credentials, if parts were sent before."""
        if self._is_in_parts and self._digests:
            # With refused credentials obstore cannot remove the parts, and reports no failure.
            _log.warning(
                "%s: the store refused the credentials during the upload, which begins again; "
                "parts of the first upload may be left in the store",
                self._address.shown,
            )

    def _verify_after_failure(self, store: Store, error: RemoteError | UsageError) -> None:
        """Raise the error of a failed upload, unless the store has the content nevertheless.

        If the store's response is lost, the request is repeated, although the store may have stored
        the object.  The repeated request then fails: the store reports that the object exists, or
        that the upload does not exist any more.

        Raises:
            RemoteError: ``error``, or the store does not answer whether it has the content.
            UsageError: ``error``.
            StoppedError: `stop` was called.  If the upload must not replace an object, an object
                with the content is deleted first.
        """
        try:
            self._check.compare("")
        except DifferentError:
            raise error from None
        except StoppedError:
            if self._overwrite:
                self._remains = Remains.UNKNOWN
            else:
                self._delete_equal(store)
            raise
        except RemoteError as failure:
            if failure.errno == errno.ENOENT:
                self._raise_with_parts(error)
            self._remains = Remains.UNKNOWN
            msg = f"{error}; the store did not answer whether it has the object nevertheless"
            raise RemoteError(msg, error.errno) from failure

    def _raise_with_parts(self, error: RemoteError | UsageError) -> NoReturn:
        """Raise the error of a failed upload; add to its message if the store may have parts.

        obstore has tried to remove the parts, but does not report whether they were removed.  If
        the store did not answer to the upload, it may not have answered to the removal either.
        """
        cause = error.__cause__
        is_unanswered = isinstance(cause, AttemptError) and not isinstance(cause, RefusedError)
        if is_unanswered and self._is_in_parts and self._digests:
            self._remains = Remains.UNKNOWN
            msg = f"{error}{MAY_REMAIN}"
            raise RemoteError(msg) from error
        raise error

    def _compare_or_delete(self, store: Store, etag: str) -> None:
        """Compare the stored object with the content; if it differs, call `_delete`.

        Raises:
            RemoteError: The object differs, or the store does not answer.  The message says whether
                the object is left.
            StoppedError: `stop` was called.  If the upload must not replace an object, `_delete`
                is called first.
        """
        try:
            self._check.compare(etag)
        except DifferentError as error:
            self._delete(store, etag)
            if self._remains is Remains.NOTHING:
                raise
            msg = f"{error}{MAY_REMAIN}"
            raise DifferentError(msg) from error
        except StoppedError:
            if self._overwrite:
                self._remains = Remains.OBJECT
            else:
                self._delete(store, etag)
            raise
        except RemoteError as error:
            if error.errno == errno.ENOENT:
                raise
            self._remains = Remains.OBJECT
            msg = f"{error}; the object is stored, but was not compared with the file"
            raise RemoteError(msg, error.errno) from error

    def _put(self, store: Store) -> Any:  # noqa: ANN401  obstore's PutResult cannot be imported
        """Store content of one part with one request, and longer content in several parts.

        A single request can have the condition that there is no object yet; an upload in several
        parts cannot.
        """
        # Set before the check: another thread calls `stop`, and then reads `has_begun`.
        self._has_begun = True
        if self._stopped.is_set():
            raise StoppedError
        self._digests.clear()
        self._is_read_to_end = False
        if not self._is_in_parts:
            block = next(self._parts(), b"")
            self._is_read_to_end = True
            if not self._overwrite:
                try:
                    with panics_translated():
                        return self._put_short(store, block, "create")
                except AlreadyExistsError:
                    raise self._exists() from None
                except ERRORS as error:
                    if code_of(error) != _NOT_IMPLEMENTED:
                        raise translated(error, store.hint) from error
            with translating(store.hint):
                return self._put_short(store, block, "overwrite")
        with translating(store.hint):
            return obstore.put(
                store.handle,
                self._address.key,
                self._parts(),
                chunk_size=self._part_bytes,
                max_concurrency=_MAX_PARALLEL_PARTS,
                use_multipart=True,
            )

    def _put_short(self, store: Store, block: bytes | bytearray, mode: Any) -> Any:  # noqa: ANN401
        """Store content of one part with one request; ``mode`` is that of ``obstore.put``."""
        return obstore.put(
            store.handle, self._address.key, bytes(block), mode=mode, use_multipart=False
        )

    def _parts(self) -> Iterator[bytearray]:
        """Yield the content in parts, as `_read_parts` does; wait before passing on an exception.

        After an exception, obstore aborts the running parts, and removes the parts that the store
        has.  Without the wait, a running part could arrive after the removal, and stay in the
        store.
        """
        try:
            yield from self._read_parts()
        except Exception:
            if self._digests:
                self._drain()
            raise

    def _drain(self) -> None:
        """Give running parts some time to end.  No part begins during this time."""
        time.sleep(_DRAIN_SECONDS)

    def _read_parts(self) -> Iterator[bytearray]:
        """Yield the content in parts; record the checksum of each part.

        The store makes the object only after this function has ended.  Another program may have
        stored an object since the upload began, so after the last part the store is asked again
        whether there is an object.

        Raises:
            UsageError: There is an object, and ``overwrite`` is false.
            RemoteError: The content is shorter than before, or the store does not answer.
            QedError: The content cannot be read or has changed, or no thread can be started.
            StoppedError: `stop` was called.
        """
        for start in range(0, self._size, self._part_bytes):
            if self._stopped.is_set():
                raise StoppedError
            block = bytearray(min(self._part_bytes, self._size - start))
            count = self._content.read_blocking(start, memoryview(block))
            if count < len(block):
                msg = f"found {start + count} bytes, expected {self._size}: the file was cut"
                raise RemoteError(msg)
            self._digests.append(hashlib.md5(block, usedforsecurity=False).digest())
            yield block
            self._report(start + len(block), self._size)
        if self._stopped.is_set():
            raise StoppedError
        _in_thread(self._refuse_existing, self._address.shown)
        self._is_read_to_end = True

    def _refuse_existing(self) -> None:
        """Ask the store whether there is an object, unless the upload may replace it.

        Raises:
            UsageError: There is an object.
            RemoteError: The store cannot be reached, or refuses.
        """
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

    def _delete(self, store: Store, etag: str) -> None:
        """Delete the object if its entity tag is ``etag``; delete nothing if ``etag`` is empty.

        Another tag means that another program has stored the object.  `remains` is UNKNOWN
        afterwards if ``etag`` is empty, or if the store does not answer or refuses.
        """
        self._remains = Remains.UNKNOWN
        try:
            if not etag:
                return
            if self._check.open().version.etag == etag:
                with panics_translated():
                    obstore.delete(store.handle, self._address.key)
        except RemoteError as error:
            if error.errno == errno.ENOENT:
                self._remains = Remains.NOTHING
        except (*ERRORS, UnusableError):
            pass
        else:
            self._remains = Remains.NOTHING

    def _delete_equal(self, store: Store) -> None:
        """Delete the object if it has the content of the upload; `stop` does not end this call.

        Without the response of the store, only a comparison shows that this upload has stored the
        object.  `remains` is UNKNOWN afterwards if the store does not answer or refuses.
        """
        try:
            etag = self._check.compare("", is_stoppable=False)
        except DifferentError:
            return
        except RemoteError as error:
            if error.errno != errno.ENOENT:
                self._remains = Remains.UNKNOWN
            return
        self._delete(store, etag)

    def _call_store(
        self,
        call: Callable[[], Any],
        renew: Callable[[], object] = lambda: None,
        total_seconds: float = 0.0,
    ) -> Any:  # noqa: ANN401  what the call returns
        """Call a function; raise the errors of `retry` instead of the exceptions of a client.

        If the store refuses the credentials, ``renew`` reads them again, and the function is called
        a second time.  If the store does not answer, the call is repeated for ``total_seconds``, or
        until `stop` is called.
        """
        return retry(self._address, call, renew, total_seconds, self._stopped)


def _in_thread(call: Callable[[], object], name: str) -> None:
    """Call a function in a new thread, and wait for it; ``name`` is the object's name in errors.

    The thread from which obstore takes the parts cannot itself call functions of obstore.

    Raises:
        HostError: The host cannot start a thread.
        BaseException: ``call`` has raised it.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    # A daemon, because the process may end while the store does not answer.
    try:
        thread = start_thread(work, name="qedfuse-upload")
    except OSError as error:
        raise HostError.from_os(error, name, "start a thread") from error
    thread.join()
    for failure in failures:
        raise failure


def part_bytes(size: int) -> int:
    """Return the length in bytes of the parts, except the last, for content of ``size`` bytes."""
    for_all_stores = min(-(-size // _MAX_PARTS_EVERYWHERE), _LONG_PART_BYTES)
    part = max(_MIN_PART_BYTES, for_all_stores, -(-size // _MAX_PARTS))
    return -(-part // _MIN_PART_BYTES) * _MIN_PART_BYTES
