"""The object that an upload has stored: comparing it with the upload's content, or deleting it."""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, Final, NoReturn

import obstore

from qedfuse.errors import RemoteError
from qedfuse.remote.client import AttemptError, RefusedError, UnusableError
from qedfuse.remote.storeerrors import ERRORS, panics_translated
from qedfuse.remote.uploadcheck import DifferentError, StoppedError

if TYPE_CHECKING:
    from qedfuse.errors import UsageError
    from qedfuse.remote.storesettings import Store
    from qedfuse.remote.uploadcheck import UploadCheck

MAY_REMAIN: Final = "; the store may still have the object or parts of it"
"""The end of an error message if the store has not confirmed that the upload was removed."""


class Remains(enum.Enum):
    """What an upload that has ended has left in the store."""

    NOTHING = enum.auto()
    """Nothing, as far as the upload knows."""
    UNKNOWN = enum.auto()
    """The object, parts of it, or nothing: the store did not confirm the removal."""
    OBJECT = enum.auto()
    """The complete object."""


class StoredObject:
    """The object of an upload that has sent its content, or has failed to send it."""

    def __init__(self, key: str, check: UploadCheck, *, overwrite: bool) -> None:
        """Prepare for the end of an upload.

        Args:
            key: The key of the object in its bucket.
            check: Compares the object with the content of the upload.
            overwrite: Whether the upload may have replaced an object.
        """
        self._key = key
        self._check = check
        self._overwrite = overwrite
        self._remains = Remains.NOTHING

    @property
    def remains(self) -> Remains:
        """What the store has; `Remains.OBJECT` after a comparison without a difference."""
        return self._remains

    def verify_after_failure(
        self, store: Store, error: RemoteError | UsageError, *, has_parts: bool
    ) -> None:
        """Raise the error of a failed upload, unless the store has the content nevertheless.

        The store has the content if the first request succeeded, but its response was lost.  The
        repeated request then failed, because the object existed already, or the upload did not
        exist any more.

        Raises:
            RemoteError: ``error``, or the store does not answer whether it has the content.
            UsageError: ``error``.
            StoppedError: `Upload.stop` was called.  Without ``overwrite``, the object is deleted
                first if it has the content.
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
                self.raise_failure(error, has_parts=has_parts)
            self._remains = Remains.UNKNOWN
            msg = f"{error}; the store did not answer whether it has the object nevertheless"
            raise RemoteError(msg, error.errno) from failure
        self._remains = Remains.OBJECT

    def raise_failure(self, error: RemoteError | UsageError, *, has_parts: bool) -> NoReturn:
        """Raise the error of a failed upload, with `MAY_REMAIN` if the store gave no answer.

        obstore has tried to remove the parts, but does not report whether they were removed.

        Args:
            error: The error.
            has_parts: Whether parts were sent.

        Raises:
            RemoteError: ``error``, or an error with the longer message.
            UsageError: ``error``.
        """
        cause = error.__cause__
        is_unanswered = isinstance(cause, AttemptError) and not isinstance(cause, RefusedError)
        if is_unanswered and has_parts:
            self._remains = Remains.UNKNOWN
            msg = f"{error}{MAY_REMAIN}"
            raise RemoteError(msg) from error
        raise error

    def compare_or_delete(self, store: Store, etag: str) -> None:
        """Compare the stored object with the content; delete it if it differs.

        Raises:
            RemoteError: The object differs, or the store does not answer.
            StoppedError: `Upload.stop` was called.  Without ``overwrite``, the object is deleted
                first.
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
        self._remains = Remains.OBJECT

    def _delete(self, store: Store, etag: str) -> None:
        """Delete the object if its entity tag is ``etag``; delete nothing if a tag is unknown.

        Another tag means that another program has stored the object.
        """
        self._remains = Remains.UNKNOWN
        try:
            found = self._check.open().version.etag if etag else ""
            if not found:
                return
            if found == etag:
                with panics_translated():
                    obstore.delete(store.handle, self._key)
        except RemoteError as error:
            if error.errno == errno.ENOENT:
                self._remains = Remains.NOTHING
        except (*ERRORS, UnusableError):
            pass
        else:
            self._remains = Remains.NOTHING

    def _delete_equal(self, store: Store) -> None:
        """Delete the object if it has the upload's content; `Upload.stop` does not end this call.

        Only a comparison shows that this upload has stored the object.
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
