"""Checks of a backing file before its name is written into an image.

trio and numpy are loaded only for a base that is a URL, or that QEMU reads, because loading them
takes longer than creating an image.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from qedfuse.disk.lookup.backingpath import backing_path, chain_paths
from qedfuse.disk.lookup.baseversion import BaseVersions, version_of_status, versions_of
from qedfuse.errors import (
    BackingError,
    BackingRefusedError,
    ForeignError,
    HostError,
    NotQedError,
    QedError,
)
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import DRIVERS, SIGNATURE_BYTES, foreign_format, is_qed
from qedfuse.ondisk.header import parse_header
from qedfuse.remote.address import is_url, shown_name
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import first_bytes

if TYPE_CHECKING:
    from qedfuse.disk.options import BackingFormat, OpenOptions
    from qedfuse.remote.options import RemoteOptions


class NewBase(NamedTuple):
    """A backing file for a new image.

    Attributes:
        size: Size in bytes of the disk that the backing file holds.
        format: Format of the backing file, as QEMU calls it.
        versions: The version of the backing file, which the new image remembers.
    """

    size: int
    format: str
    versions: BaseVersions


def refuse_backing_loop(image: str, backing: str, directory: str = "") -> None:
    """Refuse a backing file that is the image itself, or whose chain contains the image.

    The chain is found by reading headers only.

    Args:
        image: The file that will name the backing file; it need not exist.
        backing: Name of the backing file, see `backing_path`.
        directory: The working directory, as for `backing_path`.

    Raises:
        BackingError: The image is the backing file, or a file of its chain.
    """
    about = f"{printable(image)}: backing file"
    path = backing_path(image, backing, directory)
    if _is_same_file(path, image):
        msg = f"{about} {shown_name(path)}: found the image itself"
        raise BackingError(msg)
    for below in chain_paths(path, directory):
        if _is_same_file(below, image):
            msg = f"{about} {printable(below)}: found the image itself through "
            msg += shown_name(backing)
            raise BackingError(msg)


def examine_base(image: str, backing: str, wanted: BackingFormat | None) -> NewBase:
    """Return the size, the format and the version of the backing file of a new image.

    The backing file is not locked, so another program may be using it.

    Args:
        image: Path of the new image.
        backing: Name of the backing file, see `backing_path`.
        wanted: The format that the user has named, or None.  Only ``raw`` accepts a file that is
            not QED; see `examine_foreign` for other formats.

    Raises:
        BackingError: The backing file cannot be read, is in a format that ``wanted`` does not
            accept, has an invalid header, or is refused by `refuse_backing_loop`.
    """
    path = backing_path(image, backing)
    about, shown = f"{printable(image)}: backing file", printable(path)
    refuse_backing_loop(image, backing)
    try:
        fd = open_regular(path, os.O_RDONLY)
        try:
            status = os.fstat(fd)
            start = os.pread(fd, SIGNATURE_BYTES, 0)
        finally:
            os.close(fd)
        versions = BaseVersions(version_of_status(status), {})
        return _examined(start, status.st_size, versions, shown, wanted)
    except QedError as error:
        msg = f"{about} {error}"
        raise BackingError(msg) from error
    except OSError as error:
        msg = f"{about} {shown}: {error.strerror}"
        raise BackingError(msg) from error


def foreign_driver_of_base(image: str, backing: str, wanted: BackingFormat | None) -> str | None:
    """Return the format of a new image's base, in QEMU's words, if only QEMU reads it; else None.

    Args:
        image: Path of the new image.
        backing: Name of the backing file, see `backing_path`; not a URL.
        wanted: The format that the user has named, or None.

    Raises:
        BackingError: ``wanted`` is a format that only QEMU reads, and the file does not have it.
    """
    path = backing_path(image, backing)
    return foreign_base_driver(path, wanted, f"{printable(image)}: backing file ")


def foreign_base_driver(path: str, wanted: BackingFormat | None, about: str = "") -> str | None:
    """Return the format of a new backing file, in QEMU's words, if only QEMU reads it; else None.

    An image does not record this format, so later the first bytes alone decide.  A file whose
    first bytes are not those of ``wanted`` is refused even if QEMU could read it, such as a fixed
    VHD.

    Args:
        path: The path or URL of the backing file.
        wanted: The format that the user has named, or None.
        about: The beginning of the message.

    Raises:
        BackingError: ``wanted`` is a format that only QEMU reads, and the file does not have it.
    """
    if wanted in ("raw", "qed") or is_url(path):
        return None
    start = first_bytes(path)
    found = None if start is None else foreign_format(start)
    driver = None if found is None else DRIVERS[found]
    if wanted is not None and start is not None and driver != wanted:
        kind = (
            f"a {found} image"
            if found
            else "a QED image"
            if is_qed(start)
            else "no magic of an image"
        )
        msg = f"{about}{printable(path)}: found {kind}, expected the format {wanted}"
        raise BackingError(msg)
    return driver


async def examine_foreign(image: str, backing: str, driver: str, options: OpenOptions) -> NewBase:
    """Return the size, the format and the version of a backing file that QEMU reads.

    Args:
        image: Path of the new image.
        backing: Name of the backing file, see `backing_path`.
        driver: The format, as `foreign_driver_of_base` has returned it.
        options: Which files the backing file itself may name, and how they are read.

    Raises:
        BackingError: The backing file cannot be opened, locked or used, or `refuse_backing_loop`
            refuses it.
        ForeignError: QEMU is not installed, fails, or refuses the backing file.
    """
    # Imported late, because this module must not load trio.
    from qedfuse.disk.lookup.foreignopening import foreign_disk  # noqa: PLC0415  late, see above
    from qedfuse.hostio.imagefile import open_image_file  # noqa: PLC0415  late, see above

    refuse_backing_loop(image, backing)
    path = backing_path(image, backing)
    about = f"{printable(image)}: backing file"
    if options.backing.mode == "none":
        msg = f"{about} {printable(path)}: refused by backing=none"
        raise BackingRefusedError(msg)
    try:
        with open_image_file(path, options.read_lock) as file:
            async with foreign_disk(file, driver, options) as disk:
                return NewBase(disk.size(), driver, versions_of([disk]))
    except ForeignError as error:
        raise error.prefixed(about + " ") from error
    except QedError as error:
        msg = f"{about} {error}"
        raise BackingError(msg) from error


async def examine_url(
    image: str, url: str, wanted: BackingFormat | None, remote: RemoteOptions
) -> NewBase:
    """Return the size, the format and the version of a backing file that is a URL.

    Args:
        image: Path of the new image.
        url: The URL of the backing file.
        wanted: The format that the user has named, as for `examine_base`.
        remote: How to read the URL.

    Raises:
        RemoteError: The server cannot be reached, or does not serve the file.
        HostError: The cache for URLs cannot be opened, or this process has too many open
            descriptors.
        BackingError: The URL is not valid or not allowed, the format is not accepted, or the
            header is invalid.
    """
    # Imported late, because this module must not load trio.
    from qedfuse.disk.lookup.imageopening import open_image  # noqa: PLC0415  late, see above

    try:
        async with open_image(url, None, remote) as file:
            start = bytes(await file.pread(0, SIGNATURE_BYTES))
            return _examined(start, file.size(), versions_of([file]), file.name, wanted)
    except HostError as error:
        about = f"{printable(image)}: backing file "
        raise error.prefixed(about) from error
    except QedError as error:
        msg = f"{printable(image)}: backing file {error}"
        raise BackingError(msg) from error


def _examined(
    start: bytes, size: int, versions: BaseVersions, shown: str, wanted: BackingFormat | None
) -> NewBase:
    """Return the size, the format and the version of a backing file, which begins with ``start``.

    Raises:
        ImageError: The format is not accepted, or the header is invalid.
    """
    if wanted == "raw":
        return NewBase(size, "raw", versions)
    if is_qed(start):
        if wanted not in (None, "qed"):
            msg = f"{shown}: found a QED image, expected the format {wanted}"
            raise NotQedError(msg)
        header = parse_header(start[:HEADER_BYTES], shown)
        header.check_fits(size, shown)
        return NewBase(header.image_size, "qed", versions)
    found = foreign_format(start)
    if found is not None and wanted in (None, DRIVERS[found]):
        msg = (
            f"{shown}: found a {found} image, expected a QED image or a local file (-F raw shows "
            "the bytes of the image unchanged)"
        )
        raise NotQedError(msg)
    expected = "a QED image" if wanted else "a QED image, or -F raw for any other content"
    msg = f"{shown}: found no QED magic, expected {expected}"
    raise NotQedError(msg)


def _is_same_file(first: str, second: str) -> bool:
    """Return whether two paths, which need not exist, lead to the same file; False for a URL."""
    if is_url(first):
        return False
    return os.path.realpath(first) == os.path.realpath(second) or (
        os.path.exists(first)  # noqa: PTH110
        and os.path.exists(second)  # noqa: PTH110
        and os.path.samefile(first, second)  # noqa: PTH121
    )
