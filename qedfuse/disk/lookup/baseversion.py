"""The versions of the bases of an image, and their encoding in a record (`rememberedbase`)."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.hostio.hostfile import ReadableFile

_MAX_SIZE: Final = (1 << 63) - 1
"""Maximum size of a file in bytes."""


class FileVersion(NamedTuple):
    """A version of one base.

    Attributes:
        size: Length in bytes.
        validator: A text that differs between versions of equal size.  For a local file it has the
            time of modification and the inode number; otherwise the server gives it, or it is
            empty.
    """

    size: int
    validator: str

    def __str__(self) -> str:
        """Return the version of a file on a server as text for messages."""
        return f"size {self.size}" + (f" and {printable(self.validator)}" if self.validator else "")


class BaseVersions(NamedTuple):
    """The versions of the bases of an image.

    Attributes:
        local: The version of the first base if it is a local file; None if it is not.
        remote: The versions of the bases on servers, by the checksums of their URLs.
    """

    local: FileVersion | None
    remote: dict[str, FileVersion]

    def encode(self, name: str) -> bytes:
        """Return the record for an image that stores ``name`` as the name of its first base."""
        lines = [] if self.local is None else [f"{self.local.size:x} {self.local.validator}"]
        for url, version in self.remote.items():
            lines.append(f"{url} {version.size:x} {version.validator}")
        body = "\n".join(lines).encode()
        return b"%08x\n" % _checksum(name, body) + body

    @classmethod
    def decode(cls, record: bytes, name: str) -> BaseVersions | None:
        """Return the versions in a record of an image that stores ``name`` as the name of its base.

        Returns None if the record is damaged, or was made when the image stored another name.  The
        record is untrusted, because it may come with an image from another machine.  Its checksum
        finds accidental damage only.
        """
        checksum, _, body = record.partition(b"\n")
        if checksum != b"%08x" % _checksum(name, body):
            return None
        local, remote = None, {}
        try:
            for line in body.decode().split("\n"):
                if line.startswith("u"):
                    url, size, validator = line.split(" ", 2)
                    remote[url] = FileVersion(_parsed_size(size), validator)
                else:
                    size, validator = line.split(" ", 1)
                    local = FileVersion(_parsed_size(size), validator)
        except ValueError:
            return None
        return cls(local, remote)


def versions_of(bases: Sequence[ReadableFile]) -> BaseVersions:
    """Return the versions of the open bases of an image.

    ``bases`` has the first base, and then the bases below it.

    Raises:
        HostError: The attributes of a local file cannot be read.
    """
    first = bases[0]
    local = None if is_url(first.path) else version_of_status(first.stat())
    # The identity of a file on a server has the URL, the size and the validator.
    remote = {
        url_checksum(base.path): FileVersion(base.size(), str(base.identity[-1]))
        for base in bases
        if is_url(base.path)
    }
    return BaseVersions(local, remote)


def version_of_status(status: os.stat_result) -> FileVersion:
    """Return the version of a local file with the attributes ``status``."""
    return FileVersion(status.st_size, f"{status.st_mtime_ns:x}.{status.st_ino:x}")


def _parsed_size(text: str) -> int:
    """Return a size from its hexadecimal digits; raise ValueError if no file can have it.

    Without the limit, a message could contain an integer of thousands of digits, which Python
    refuses to convert to text.
    """
    size = int(text, 16)
    if not 0 <= size <= _MAX_SIZE:
        msg = "found a size that no file can have"
        raise ValueError(msg)
    return size


def _checksum(name: str, body: bytes) -> int:
    """Return the checksum over ``body`` and the name that the image stores for its first base."""
    return zlib.crc32(os.fsencode(name) + b"\0" + body)


def url_checksum(url: str) -> str:
    """Return the checksum of a URL in a record: ``u`` and eight hexadecimal digits."""
    return f"u{zlib.crc32(os.fsencode(url)):08x}"
