"""Which version of its base an overlay was written over, remembered beside the overlay.

An overlay has only the differences from its base, so over another base it shows a disk that never
existed.  When an overlay is opened for writing, the version of its base is stored in an extended
attribute of the overlay, or in a file beside the overlay if its file system has no such attributes.
A later open compares:

- A file on a server must be the version that was remembered, by its size and validator, and so
  must all bases below it.
- A local file should have the same size and time of modification.  A difference is only logged,
  because other programs change the time of a base that keeps its content.

The record has a checksum of the base's name as well, so a record from before a change of that name,
by any program, is ignored.  The record of a local base is short, so that the attribute needs no
block of its own on file systems that store short attributes in the inode.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.errors import BackingError
from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.hostio.hostfile import HostFile

_log = logging.getLogger(__name__)

_ATTRIBUTE: Final = "user.qedfuse.base"
_SUFFIX: Final = ".base"
"""What follows the name of the overlay in the name of the file that replaces the attribute."""
_MAX_RECORD_BYTES: Final = 64 << 10
_NO_ATTRIBUTES: Final = (errno.ENOTSUP, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM)
"""Errors of setxattr(2) after which a file is used instead."""


class _Version(NamedTuple):
    """A version of one file.

    Attributes:
        size: Length in bytes.
        validator: What distinguishes versions of equal size: what a server says, or, for a local
            file, its time of modification and its inode.
    """

    size: int
    validator: str

    def is_other(self, new: _Version) -> bool:
        """Return whether ``new`` is another version of a file on a server."""
        if not (self.validator and new.validator):
            return self.size != new.size
        return self != new

    def __str__(self) -> str:
        """Return the version of a file on a server for messages."""
        return f"size {self.size}" + (f" and {printable(self.validator)}" if self.validator else "")


def verify_base(image: HostFile, name: str, bases: Sequence[HostFile], *, accept: bool) -> None:
    """Compare the bases of an image with the version that was remembered, if one was.

    A local base that differs is logged.

    Args:
        image: The image.
        name: The name of the first base in the image.
        bases: The first base and those below it.
        accept: Whether to accept bases that differ.

    Raises:
        BackingError: A base is a file on a server and of another version.
    """
    expected = _read(image, name)
    if expected is None or accept:
        return
    found = _versions(bases)
    first = bases[0]
    if not is_url(first.path):
        _warn_if_changed(image, first, expected[0], found[0])
        return
    if len(expected) != len(found):
        msg = (
            f"{image.name}: backing file {first.name}: found {len(found)} files in the chain, "
            f"expected {len(expected)} as when the image was first written to (base_changed "
            "accepts it)"
        )
        raise BackingError(msg)
    for base, old, new in zip(bases, expected, found, strict=True):
        if old.is_other(new):
            msg = (
                f"{image.name}: backing file {base.name}: found {new}, expected {old} as when the "
                "image was first written to (base_changed accepts it)"
            )
            raise BackingError(msg)


def _warn_if_changed(image: HostFile, base: HostFile, old: _Version, new: _Version) -> None:
    """Log that a local base has another size or time of modification than the one remembered.

    A base that was copied with its times, as from a backup, has another inode only.
    """
    old_time, _, old_inode = old.validator.partition(".")
    new_time, _, new_inode = new.validator.partition(".")
    if (old.size, old_time) != (new.size, new_time):
        _log.warning(
            "%s: backing file %s: found it %s since the image was first written to, so the "
            "disk may be corrupt (base_changed accepts it)",
            *(image.name, base.name, "modified" if old_inode == new_inode else "replaced"),
        )


def remember_base(image: HostFile, name: str, bases: Sequence[HostFile], *, accept: bool) -> None:
    """Store the version of the bases of an image that is open for writing.

    A version that was remembered before is kept, unless ``accept`` is set.  If the host refuses,
    this is logged.  The arguments are those of `verify_base`.
    """
    old = _read(image, name)
    versions = _versions(bases)
    if image.fileno() < 0 or old == versions or (old is not None and not accept):
        return
    lines = [_checksum(name), *(f"{version.size:x} {version.validator}" for version in versions)]
    record = "\n".join(lines).encode()
    try:
        try:
            os.setxattr(image.fileno(), _ATTRIBUTE, record)
        except OSError as error:
            if error.errno not in _NO_ATTRIBUTES:
                raise
            forget_base(image)
            _write_file(image.path + _SUFFIX, record)
    except OSError as error:
        _log.warning(
            "%s: cannot remember the version of the backing file: %s",
            *(image.name, os.strerror(error.errno or 0)),
        )


def forget_base(image: HostFile) -> None:
    """Remove what is remembered about the bases of an image, because they have been changed.

    Does nothing if nothing is remembered or the host refuses.
    """
    if image.fileno() >= 0:
        with suppress(OSError):
            os.removexattr(image.fileno(), _ATTRIBUTE)
        with suppress(OSError):
            os.unlink(image.path + _SUFFIX)  # noqa: PTH108  str paths


def _read(image: HostFile, name: str) -> list[_Version] | None:
    """Return the versions that are remembered for the bases of an image.

    None if there is no valid record, or if it is about bases of another name.
    """
    if image.fileno() < 0:
        return None
    try:
        try:
            raw = os.getxattr(image.fileno(), _ATTRIBUTE)
        except OSError:
            raw = _read_file(image.path + _SUFFIX)
        checksum, *lines = raw.decode().split("\n")
        if checksum != _checksum(name) or not lines:
            return None
        pairs = [line.partition(" ") for line in lines]
        return [_Version(int(size, 16), validator) for size, _, validator in pairs]
    except (OSError, ValueError):
        return None


def _read_file(path: str) -> bytes:
    """Return the content of the file that replaces the attribute.

    Raises:
        OSError: The file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.pread(fd, _MAX_RECORD_BYTES, 0)
    finally:
        os.close(fd)


def _write_file(path: str, record: bytes) -> None:
    """Write the file that replaces the attribute; there is no such file.

    Raises:
        OSError: The host refused.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, record)  # a record that is cut is not valid, and is ignored
    finally:
        os.close(fd)


def _versions(bases: Sequence[HostFile]) -> list[_Version]:
    """Return the versions of the bases that are compared, those of one local file or of all URLs.

    Raises:
        HostError: The attributes of the local file cannot be read.
    """
    first = bases[0]
    if not is_url(first.path):
        status = first.stat()
        return [_Version(status.st_size, f"{status.st_mtime_ns:x}.{status.st_ino:x}")]
    # Below a URL there are only URLs, whose identity has the URL, the size and the validator.
    return [_Version(base.size(), str(base.identity[-1])) for base in bases]


def _checksum(name: str) -> str:
    """Return a checksum of the name of a base as an image stores it."""
    return f"{zlib.crc32(os.fsencode(name)):08x}"
