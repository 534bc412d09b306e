"""Finding the images that the user's sources stand for, and naming their disks in the mount."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import MountpointError, NotQedError, cannot_open
from qedfuse.ondisk.formats import SIGNATURE_BYTES, is_qed
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUFFIX: Final = ".qed"


@dataclass(frozen=True, slots=True)
class Source:
    """An image to be mounted.

    Attributes:
        path: The absolute path of the image.
        name: The file name of the disk in the mount.
        is_named: True if the user named the image itself; False if the user named the directory
            of the image.
    """

    path: str
    name: bytes
    is_named: bool = True


def disk_file_name(path: str) -> bytes:
    """Return the file name of a disk: ``vm.raw`` for ``vm.qed``, ``x.img.raw`` for ``x.img``.

    The suffix ``.qed`` is replaced, because the disk is raw.  Any other suffix is kept, because
    two images may differ only in their suffix.
    """
    name = os.path.basename(path)  # noqa: PTH119  also for names that are not text
    if name.endswith(_SUFFIX) and name != _SUFFIX:
        name = name.removesuffix(_SUFFIX)
    return os.fsencode(name + ".raw")


def find_sources(paths: Iterable[str]) -> list[Source]:
    """Return the images that the paths of sources stand for, in the order of the paths.

    A directory stands for all images in it, sorted by name.  Any other path stands for itself,
    and need not exist.

    Raises:
        HostError: A directory cannot be read.
        NotQedError: A directory contains no image.
        MountpointError: The disks of two images would have the same file name.
    """
    images: dict[bytes, Source] = {}
    for path in paths:
        absolute = os.path.abspath(path)  # noqa: PTH100  must not resolve links
        is_directory = os.path.isdir(absolute)  # noqa: PTH112
        for image in _images_in(absolute) if is_directory else [absolute]:
            source = Source(image, disk_file_name(image), is_named=not is_directory)
            other = images.setdefault(source.name, source)
            if other is not source:
                msg = (
                    f"{printable(image)}: found the name {printable(source.name)} taken by "
                    f"{printable(other.path)}, expected a different name for each image"
                )
                raise MountpointError(msg)
    return list(images.values())


def _images_in(directory: str) -> list[str]:
    """Return the paths of the QED images in a directory, recognised by their magic, sorted by name.

    Raises:
        HostError: The directory cannot be read.
        NotQedError: The directory contains no QED image.
    """
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
    """Return whether a path is a regular file with the magic of a QED image.

    False if the file cannot be read.
    """
    try:
        # The type is checked before the open, because opening a FIFO or a device could wait or
        # have side effects.
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
