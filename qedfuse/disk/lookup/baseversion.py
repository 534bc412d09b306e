"""Which version of its bases an overlay was made over, remembered beside the overlay.

An overlay has only the differences from its base, so over another base it shows a disk that never
existed.  So the versions of the bases are stored with the image (`baserecord`) when it is created,
converted or rebased; or else when it is opened for writing.  A later open compares:

- Each file on a server must be the version that was remembered, by its size and validator.  It
  does not matter whether it is the first base or one below it.
- The first base, if it is a local file, should have the same size and time of modification.  A
  difference is only logged, because other programs change the time of a base that keeps its
  content.  An open for writing then remembers the new time, so that each change is logged once.

The record has a checksum that includes the name of the base, so a record from before a change of
that name, by any program, is ignored.  The record of a local base is short, so that the attribute
needs no block of its own on file systems that store short attributes in the inode.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from typing import TYPE_CHECKING, NamedTuple

from qedfuse.errors import BackingError, QedError
from qedfuse.hostio.baserecord import read_record, remove_record, set_attribute, write_file
from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.hostio.hostfile import HostFile, ReadableFile

_log = logging.getLogger(__name__)


class Version(NamedTuple):
    """A version of one file.

    Attributes:
        size: Length in bytes.
        validator: What distinguishes versions of equal size: what a server says, or, for a local
            file, its time of modification and its inode.
    """

    size: int
    validator: str

    def is_other(self, new: Version) -> bool:
        """Return whether ``new`` is another version of a file on a server."""
        if not (self.validator and new.validator):
            return self.size != new.size
        return self != new

    def __str__(self) -> str:
        """Return the version of a file on a server for messages."""
        return f"size {self.size}" + (f" and {printable(self.validator)}" if self.validator else "")


class BaseVersions(NamedTuple):
    """The versions of the bases of an image.

    Attributes:
        local: The first base, if it is a local file; otherwise None.
        remote: The bases on servers, by the checksum of the URL.
    """

    local: Version | None
    remote: dict[str, Version]

    def encode(self, name: str) -> bytes:
        """Return the record for an image whose first base has the name ``name`` in the image."""
        lines = [] if self.local is None else [f"{self.local.size:x} {self.local.validator}"]
        for url, version in self.remote.items():
            lines.append(f"{url} {version.size:x} {version.validator}")
        body = "\n".join(lines).encode()
        return b"%08x\n" % _checksum(name, body) + body

    @classmethod
    def decode(cls, record: bytes, name: str) -> BaseVersions | None:
        """Return the versions in a record; None if it is damaged, or if the base had another name.

        A checksum of a URL has 9 characters, the first of which is ``u``.
        """
        checksum, _, body = record.partition(b"\n")
        if checksum != b"%08x" % _checksum(name, body):
            return None
        local, remote = None, {}
        try:
            for line in body.decode().split("\n"):
                if line.startswith("u"):
                    url, size, validator = line.split(" ", 2)
                    remote[url] = Version(int(size, 16), validator)
                else:
                    size, validator = line.split(" ", 1)
                    local = Version(int(size, 16), validator)
        except ValueError:
            return None
        return cls(local, remote)


def versions_of(bases: Sequence[ReadableFile]) -> BaseVersions:
    """Return the versions of the open bases of an image, from the first base down.

    Raises:
        HostError: The attributes of a local file cannot be read.
    """
    first = bases[0]
    local = None if is_url(first.path) else version_of_status(first.stat())
    # The identity of a file on a server has the URL, the size and the validator.
    remote = {
        _url_checksum(base.path): Version(base.size(), str(base.identity[-1]))
        for base in bases
        if is_url(base.path)
    }
    return BaseVersions(local, remote)


def version_of_status(status: os.stat_result) -> Version:
    """Return the version of a local file with the attributes ``status``."""
    return Version(status.st_size, f"{status.st_mtime_ns:x}.{status.st_ino:x}")


def verify_base(image: HostFile, name: str, bases: Sequence[HostFile], *, accept: bool) -> None:
    """Compare the bases of an image with the versions that were remembered, if they were.

    A local base that differs is logged.  If the image is open for writing, the versions are then
    remembered, except those of files on servers that were remembered before and are not accepted
    now.  If the host refuses that, it is logged.

    Args:
        image: The image.
        name: The name of the first base in the image.
        bases: The first base and those below it.
        accept: Whether to accept bases that differ.

    Raises:
        BackingError: A base is a file on a server and of another version.
        HostError: The attributes of a local base cannot be read.
    """
    if image.fileno() < 0:
        return
    old, new = _read(image, name), versions_of(bases)
    if old is not None and not accept:
        _compare(image, bases, old, new)
        kept = {url: old.remote.get(url, version) for url, version in new.remote.items()}
        new = new._replace(remote=kept)
    if image.writable and old != new:
        _store(image.fileno(), image.path, image.name, name, new)


def _compare(
    image: HostFile, bases: Sequence[HostFile], old: BaseVersions, new: BaseVersions
) -> None:
    """Compare the versions of the bases of an image; log a difference of a local base.

    Raises:
        BackingError: A base is a file on a server and of another version.
    """
    for base in bases:
        url = _url_checksum(base.path)
        expected, found = old.remote.get(url), new.remote.get(url)
        if expected is not None and found is not None and expected.is_other(found):
            msg = (
                f"{image.name}: backing file {base.name}: found {found}, expected {expected} as "
                "when the image was made over it (base_changed accepts it)"
            )
            raise BackingError(msg)
    if old.local is not None and new.local is not None:
        _warn_if_changed(image, bases[0], old.local, new.local)


def _warn_if_changed(image: HostFile, base: HostFile, old: Version, new: Version) -> None:
    """Log that a local base has another size or time of modification than the one remembered.

    A base that was copied with its times, as from a backup, has another inode only.
    """
    old_time, _, old_inode = old.validator.partition(".")
    new_time, _, new_inode = new.validator.partition(".")
    if (old.size, old_time) != (new.size, new_time):
        _log.warning(
            "%s: backing file %s: found it %s since the image was last opened for writing, so the "
            "disk may be corrupt (base_changed accepts it)",
            *(image.name, base.name, "modified" if old_inode == new_inode else "replaced"),
        )


def replace_base(image: HostFile, name: str, versions: BaseVersions | None) -> None:
    """Store the versions of the new bases of an image, whatever was remembered before.

    Args:
        image: The image, which is open for writing.
        name: The name of the first base in the image.
        versions: The versions of the bases.  None if there are none, or if they are not known: then
            nothing is remembered until the image is opened for writing again.
    """
    if versions is None:
        remove_record(image.fileno(), image.path)
    else:
        _store(image.fileno(), image.path, image.name, name, versions)


def accept_commit(image: HostFile, name: str, status: os.stat_result) -> None:
    """Remember the new version of the local base of an image, to which the caller has committed.

    Does nothing if no version is remembered.

    Args:
        image: The image.
        name: The name of the base in the image.
        status: The attributes of the base after the commit.
    """
    old = _read(image, name)
    if old is not None and old.local is not None:
        versions = old._replace(local=version_of_status(status))
        _store(image.fileno(), image.path, image.name, name, versions)


def remember_in_attribute(fd: int, name: str, versions: BaseVersions) -> bool:
    """Store the versions of the bases of a new image that has not got its name yet.

    Args:
        fd: The open image.
        name: The name of the first base in the image.
        versions: The versions of the bases.

    Returns:
        False if the host cannot store them; the caller then calls `remember_beside` when the image
        has its name.
    """
    try:
        return set_attribute(fd, versions.encode(name))
    except OSError:
        return False


def remember_beside(path: str, name: str, versions: BaseVersions) -> None:
    """Store the versions of the bases of a new image in a file beside it.

    The arguments are those of `remember_in_attribute`, with the path of the image.  If the host
    refuses, this is logged.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _log_refusal(printable(path), error)
        return
    try:
        _store(fd, path, printable(path), name, versions)
    finally:
        os.close(fd)


def _store(fd: int, path: str, shown: str, name: str, versions: BaseVersions) -> None:
    """Store the versions of the bases of an image, or log that the host refuses.

    Only versions of files on servers are worth a file beside the image: if the file system has no
    attributes, the version of a local base is not remembered.
    """
    record = versions.encode(name)
    try:
        if not set_attribute(fd, record):
            if versions.remote:
                write_file(fd, path, record)
            else:
                remove_record(fd, path)
    except (OSError, QedError) as error:
        _log_refusal(shown, error)


def _read(image: HostFile, name: str) -> BaseVersions | None:
    """Return the versions that are remembered for the bases of an image.

    None if there is no valid record, or if it is about a base of another name.  A record that
    cannot be read is logged.
    """
    try:
        record = read_record(image.fileno(), image.path)
    except OSError as error:
        _log.warning(
            "%s: cannot read the version of the backing file that was remembered: %s",
            *(image.name, os.strerror(error.errno or errno.EIO)),
        )
        return None
    return None if record is None else BaseVersions.decode(record, name)


def _log_refusal(shown: str, error: OSError | QedError) -> None:
    """Log why the versions of the bases of an image cannot be remembered."""
    reason = str(error) if isinstance(error, QedError) else os.strerror(error.errno or errno.EIO)
    _log.warning("%s: cannot remember the version of the backing file: %s", shown, reason)


def _checksum(name: str, body: bytes) -> int:
    """Return the checksum of a record with the name of the base as the image stores it."""
    return zlib.crc32(os.fsencode(name) + b"\0" + body)


def _url_checksum(url: str) -> str:
    """Return what stands for a URL in a record."""
    return f"u{zlib.crc32(os.fsencode(url)):08x}"
