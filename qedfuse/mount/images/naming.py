"""Finding the images that the user's sources stand for, and naming their disks in the mount."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from qedfuse.errors import MountpointError, NotQedError, cannot_open
from qedfuse.ondisk.formats import SIGNATURE_BYTES, is_qed
from qedfuse.remote.address import is_url, parse_address
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUFFIX: Final = ".qed"
_EXPORT: Final = "export"
"""The name of the disk, without its suffix, if the URL of an NBD export has no path."""
MAX_NAME_BYTES: Final = 255
"""Maximum length of the file name of a disk, as in other file systems."""
PARTITION_INFIX: Final = b".p"
"""What separates the file name of a disk from the number in the file name of a partition."""


@dataclass(frozen=True, slots=True)
class Source:
    """An image to be mounted.

    Attributes:
        path: The absolute path of the image, or its normalised URL.
        name: The file name of the disk in the mount.
        is_named: Whether the user named the image itself, and not its directory.
    """

    path: str
    name: bytes
    is_named: bool = True

    @property
    def shown(self) -> str:
        """The path or URL for messages."""
        return shown_source(self.path)


def absolute_source(path: str) -> str:
    """Return the absolute form of a path that the user gave; return a URL unchanged.

    The path stays as it was given: after a symbolic link, ``..`` leads elsewhere than the text.
    """
    return path if is_url(path) else str(Path(path).absolute())


def shown_source(path: str) -> str:
    """Return a path or URL for messages; omits the query of a URL, because it may be a secret."""
    return parse_address(path).shown if is_url(path) else printable(path)


def disk_file_name(path: str) -> bytes:
    """Return the file name of a disk: ``vm.raw`` for ``vm.qed``, ``x.img.raw`` for ``x.img``.

    Other suffixes are kept, because two images may differ only in their suffix.  Of a URL, the last
    component of the path is used; the disk of an NBD export without a path is ``export.raw``.
    """
    if is_url(path):
        path = os.fsdecode(unquote_to_bytes(parse_address(path).path)).rstrip("/") or _EXPORT
    name = os.path.basename(path)  # noqa: PTH119  str paths
    if name.endswith(_SUFFIX) and name != _SUFFIX:
        name = name.removesuffix(_SUFFIX)
    return os.fsencode(name + ".raw")


def find_sources(paths: Iterable[str]) -> list[Source]:
    """Return the images that the paths of sources stand for, in the order of the paths.

    A directory stands for all QED images in it, sorted by name.  Any other path, or a URL, stands
    for itself, and need not exist.

    Raises:
        UsageError: A URL is not valid.
        HostError: A directory cannot be read.
        NotQedError: A directory contains no QED image.
        MountpointError: The disks of two images would have the same file name, or a name is too
            long.
    """
    images: dict[bytes, Source] = {}
    for path in paths:
        absolute = parse_address(path).url if is_url(path) else absolute_source(path)
        is_directory = not is_url(path) and os.path.isdir(absolute)  # noqa: PTH112
        for image in _images_in(absolute) if is_directory else [absolute]:
            source = Source(image, disk_file_name(image), is_named=not is_directory)
            if len(source.name) > MAX_NAME_BYTES:
                msg = (
                    f"{source.shown}: found a name of {len(source.name)} bytes for the disk, "
                    f"expected at most {MAX_NAME_BYTES}"
                )
                raise MountpointError(msg)
            other = images.setdefault(source.name, source)
            if other is not source:
                msg = (
                    f"{source.shown}: found the name {printable(source.name)} taken by "
                    f"{other.shown}, expected a different name for each image"
                )
                raise MountpointError(msg)
    return list(images.values())


def _images_in(directory: str) -> list[str]:
    """Return the paths of the QED images in a directory, sorted by name."""
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208  names, not paths
    except OSError as error:
        raise cannot_open(directory, error) from error
    images = [path for name in names if _is_image(path := os.path.join(directory, name))]  # noqa: PTH118
    if not images:
        msg = f"{printable(directory)}: found no QED image in the directory, expected at least one"
        raise NotQedError(msg)
    return images


def _is_image(path: str) -> bool:
    """Return whether a path is a readable regular file with the magic of a QED image."""
    try:
        # Checked before the open: opening a FIFO or a device could wait or have side effects.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return False
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return is_qed(os.pread(fd, SIGNATURE_BYTES, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
