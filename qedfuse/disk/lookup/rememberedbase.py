"""The versions of the bases over which an overlay was made, remembered with the overlay.

Over another base, an overlay shows a disk that never existed.  So a record of the versions of the
bases (`baserecord`) is stored with a new image.  An image without a record gets one when it is
opened for writing.  A later open compares:

- Each base on a server, at any depth of the chain, must have the size and the validator (ETag or
  time of modification) that were remembered.
- The first base, if it is a local file, should have the same size and time of modification.  A
  difference is only logged, because other programs change the time of a base that keeps its
  content.  An open for writing then remembers the new time, so that each change is logged once.

The record has a checksum that includes the name of the base.  So the record is ignored if a
program has changed that name.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.baseversion import (
    BaseVersions,
    url_checksum,
    version_of_status,
    versions_of,
)
from qedfuse.errors import BackingError, QedError
from qedfuse.hostio.baserecord import (
    read_record,
    remove_record,
    remove_record_file,
    set_attribute,
    write_record_file,
)
from qedfuse.remote.address import is_nbd_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.disk.lookup.baseversion import FileVersion
    from qedfuse.hostio.hostfile import HostFile

_log = logging.getLogger(__name__)


def verify_bases(
    images: Sequence[tuple[HostFile, str]], bases: Sequence[HostFile], *, accept: bool
) -> None:
    """Compare the bases of each image of a chain with the versions that the image remembers.

    The errors are those of `verify_base`.

    Args:
        images: Each image that has a base, with the name that the image stores for the base.  The
            name is empty if the base was opened by another name; such an image is skipped.
        bases: The bases of the uppermost image, from its first base downwards.
        accept: Whether to accept other versions.
    """
    # The lowest image comes first.  So if a base of an image is refused, nothing has been stored
    # with the images above it.
    for depth, (image, name) in reversed(list(enumerate(images))):
        if name:
            verify_base(image, name, bases[depth:], accept=accept)


def remembered_version(images: Sequence[tuple[HostFile, str]], url: str) -> FileVersion | None:
    """Return the version of a base that the images above it remember; None if none does.

    If the images remember different versions, the uppermost one decides.

    Args:
        images: See `verify_bases`.
        url: The normalised URL of the base.
    """
    checksum = url_checksum(url)
    for image, name in images:
        if name and image.fileno() >= 0:
            _, versions = _try_read(image, name, is_vital=False)
            if versions is not None and checksum in versions.remote:
                return versions.remote[checksum]
    return None


def verify_base(image: HostFile, name: str, bases: Sequence[HostFile], *, accept: bool) -> None:
    """Compare the bases of an image with the versions that the image remembers, if any.

    A changed size or time of modification of a local base is only logged.  An image that is open
    for writing remembers the present versions afterwards.

    Args:
        image: The image; if it is not a local file, nothing is done.
        name: The name that the image stores for its first base.
        bases: The first base and those below it.
        accept: Whether to omit the comparison.

    Raises:
        BackingError: A base is a file on a server whose version is not the remembered one.
        HostError: The attributes of a local base cannot be read.
    """
    if image.fileno() < 0:
        return
    new = versions_of(bases)
    is_read, old = _try_read(image, name, is_vital=bool(new.remote))
    if not is_read and not accept:
        return  # the record may be intact, so it is not replaced
    if old is not None and not accept:
        _compare(image, bases, old, new)
    if image.writable and old != new:
        _store(image.fileno(), image.path, image.name, name, new)


def _compare(
    image: HostFile, bases: Sequence[HostFile], old: BaseVersions, new: BaseVersions
) -> None:
    """Refuse a base on a server with another version; log a difference of a local base."""
    for base in bases:
        checksum = url_checksum(base.path)
        expected, found = old.remote.get(checksum), new.remote.get(checksum)
        if expected is not None and found is not None and expected != found:
            # For other servers than those of NBD, `open_base` would have opened the expected
            # version if the cache had all of it.
            cache = "" if is_nbd_url(base.path) else "; no cache has all of the expected version"
            msg = (
                f"{image.name}: backing file {base.name}: found {found}, expected {expected}, "
                f"which the image remembers{cache} (base_changed accepts the version found)"
            )
            raise BackingError(msg)
    if old.local is not None and new.local is not None:
        _warn_if_changed(image, bases[0], old.local, new.local)


def _warn_if_changed(image: HostFile, base: HostFile, old: FileVersion, new: FileVersion) -> None:
    """Log a warning if a local base has another size or time of modification than remembered."""
    old_time, _, old_inode = old.validator.partition(".")
    new_time, _, new_inode = new.validator.partition(".")
    if (old.size, old_time) != (new.size, new_time):
        _log.warning(
            "%s: backing file %s: found it %s since the image was last opened for writing, so the "
            "disk may be corrupt (base_changed omits this warning)",
            *(image.name, base.name, "modified" if old_inode == new_inode else "replaced"),
        )


def replace_versions(image: HostFile, name: str, versions: BaseVersions | None) -> None:
    """Store the versions of the new bases of an image, whatever was remembered before.

    Args:
        image: The image, which is open for writing.
        name: The name that the image stores for its first base.
        versions: The versions of the bases.  If None, nothing is remembered until the image is
            opened for writing again.
    """
    if versions is None:
        remove_record(image.fileno(), image.path)
    else:
        _store(image.fileno(), image.path, image.name, name, versions)


def accept_commit(image: HostFile, name: str, status: os.stat_result) -> None:
    """Remember the new version of an image's local base after a commit of the image to that base.

    Args:
        image: The image; if it remembers no local base, nothing is done.
        name: The name that the image stores for the base.
        status: The attributes of the base after the commit.
    """
    _, old = _try_read(image, name, is_vital=False)
    if old is not None and old.local is not None:
        versions = old._replace(local=version_of_status(status))
        _store(image.fileno(), image.path, image.name, name, versions)


class NewRecord:
    """Stores the versions of the bases of a new image, in two steps.

    The record is an extended attribute of the image, or else a file beside it.  The attribute is
    stored before the image gets its final name, so that the image never has that name without the
    record.  The file is made afterwards, because its name is derived from the image's.
    """

    def __init__(self, name: str, versions: BaseVersions | None) -> None:
        """Prepare the record.

        Args:
            name: The name that the image stores for its first base.
            versions: The versions of the bases; None to store no record.
        """
        self._name = name
        self._versions = versions
        self._is_stored = False

    def store(self, fd: int) -> None:
        """Store the record as an attribute, if possible, before the image gets its final name."""
        if self._versions is not None:
            with suppress(OSError):
                self._is_stored = set_attribute(fd, self._versions.encode(self._name))

    def finish(self, path: str) -> None:
        """Store the record if `store` has not stored it; the image must have its final name now.

        If there are no versions to store, a record file of an earlier image is removed.
        """
        if self._is_stored:
            return
        if self._versions is None:
            remove_record_file(path)
            return
        shown = printable(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            _log_refusal(shown, self._versions, error)
            return
        try:
            _store(fd, path, shown, self._name, self._versions)
        finally:
            os.close(fd)


def _store(fd: int, path: str, shown: str, name: str, versions: BaseVersions) -> None:
    """Store the versions of the bases of an image, or log that the host refuses.

    If there is no place for the attribute, a file is made, but only if a base is on a server.
    """
    record = versions.encode(name)
    try:
        if not set_attribute(fd, record):
            if versions.remote:
                write_record_file(fd, path, record)
            else:
                remove_record(fd, path)
    except (OSError, QedError) as error:
        _log_refusal(shown, versions, error)


def _try_read(image: HostFile, name: str, *, is_vital: bool) -> tuple[bool, BaseVersions | None]:
    """Read the record of an image; return whether that succeeded, and the versions in the record.

    The versions are None if there is no valid record for ``name``, or if it cannot be read.  A
    failure to read it is logged: as a warning if ``is_vital`` is set, otherwise for debugging.
    """
    try:
        record = read_record(image.fileno(), image.path)
    except OSError as error:
        _log.log(
            logging.WARNING if is_vital else logging.DEBUG,
            "%s: cannot read the version of the backing file that was remembered: %s",
            *(image.name, os.strerror(error.errno or errno.EIO)),
        )
        return False, None
    return True, None if record is None else BaseVersions.decode(record, name)


def _log_refusal(shown: str, versions: BaseVersions, error: OSError | QedError) -> None:
    """Log why versions cannot be remembered; as a warning only if a base is on a server."""
    reason = str(error) if isinstance(error, QedError) else os.strerror(error.errno or errno.EIO)
    level = logging.WARNING if versions.remote else logging.DEBUG
    _log.log(level, "%s: cannot remember the version of the backing file: %s", shown, reason)
