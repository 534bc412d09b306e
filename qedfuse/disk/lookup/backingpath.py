"""The names of backing files: the paths that they stand for, and the paths of a whole chain."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.errors import QedError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import SIGNATURE_BYTES, detected_driver
from qedfuse.ondisk.header import parse_header
from qedfuse.remote.address import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_CHAIN_DEPTH: Final = 64
"""Maximum number of backing files in a chain."""

_FILE: Final = "file:"
"""QEMU's protocol for files: the rest of the name is a path, which may contain colons."""


def has_protocol(name: bytes) -> bool:
    """Return whether a name begins, as QEMU reads names, with a protocol other than ``file:``."""
    return b":" in name.split(b"/", 1)[0] and not name.startswith(os.fsencode(_FILE))


def lacks_path(name: bytes) -> bool:
    """Return whether a name is ``file:`` with no path after it."""
    return name == os.fsencode(_FILE)


def backing_path(image: str, name: str, directory: str = "") -> str:
    """Return the path or URL of the backing file that an image names, without any I/O.

    A relative name is relative to the directory of the image, even if the image is a URL.  A
    relative path after ``file:`` is relative to the working directory, as in QEMU.

    Args:
        image: The path or URL of the image.
        name: The name in the image: a plain path, a path after ``file:``, or a URL.
        directory: The working directory; empty for the working directory of the process.
    """
    if is_url(name):
        return name
    if name.startswith(_FILE):
        return os.path.join(directory, name.removeprefix(_FILE))  # noqa: PTH118  no I/O
    if is_url(image):
        image = image.partition("?")[0]
    return os.path.join(os.path.dirname(image), name)  # noqa: PTH118, PTH120  no I/O


def chain_paths(image: str, directory: str = "") -> Iterator[str]:
    """Yield the paths of the files from which an image is read, from the top, by headers only.

    These are its bases, and of an image in a format of QEMU also the files that have its data.  The
    image itself is left out, unless the chain is a loop.

    The chain ends with a file that is raw, has no base, cannot be read or parsed, or is a URL.  The
    last path may lead to no file.  At most `MAX_CHAIN_DEPTH` + 1 paths of bases are yielded, even
    if the chain is a loop, and at most `MAX_EXTENTS` other paths for each base.

    Names after ``file:`` are relative to ``directory``, as for `backing_path`.
    """
    path, stated = image, None
    for _ in range(MAX_CHAIN_DEPTH + 1):
        named = _files_named_by(path, stated)
        for other in named.data:
            yield backing_path(path, other, directory)
        if not named.base:
            return
        path, stated = backing_path(path, named.base, directory), named.base_driver
        yield path
        if stated == "raw":
            return


class _NamedFiles(NamedTuple):
    """The names of files in the header of an image.

    Attributes:
        base: Name of the base; empty if there is none, or if the file cannot be used.
        base_driver: Format of the base, as QEMU calls it; None if the header does not state it.
        data: Names of the files that have the image's own data, if these are separate files.
    """

    base: str
    base_driver: str | None = None
    data: Sequence[str] = ()


_NO_FILES: Final = _NamedFiles("")


def _files_named_by(path: str, driver: str | None) -> _NamedFiles:
    """Return the names in the header of an image.

    ``driver`` is the format, as QEMU calls it; None to detect the format from the first bytes.
    """
    if is_url(path):  # a URL is not opened here
        return _NO_FILES
    try:
        fd = open_regular(path, os.O_RDONLY)
    except (OSError, QedError):
        return _NO_FILES
    try:
        if driver is None:
            driver = detected_driver(os.pread(fd, SIGNATURE_BYTES, 0))
        if driver == "qed":
            return _names_in_qed(fd, path)
        return _NO_FILES if driver == "raw" else _names_in_foreign(fd, path, driver)
    except (OSError, QedError):
        return _NO_FILES
    finally:
        os.close(fd)


def _names_in_qed(fd: int, path: str) -> _NamedFiles:
    """Return the name in the header of a QED image."""
    header = parse_header(os.pread(fd, HEADER_BYTES, 0), path)
    if not header.has_backing:
        return _NO_FILES
    raw = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
    return _NamedFiles(_usable_name(raw), "raw" if header.backing_is_raw else None)


def _names_in_foreign(fd: int, path: str, driver: str) -> _NamedFiles:
    """Return the names in the header of an image in a format of QEMU."""
    # Imported late, because loading the module takes time, and most chains have no such image.
    from qedfuse.foreign.links import MAX_EXTENTS, RAW_DRIVERS, read_links  # noqa: PLC0415

    links = read_links(fd, driver, path)
    stated = links.backing_driver
    data = [_usable_name(name) for name in (links.data_file, *links.extents[:MAX_EXTENTS])]
    return _NamedFiles(
        _usable_name(links.backing),
        "raw" if stated in RAW_DRIVERS else stated,
        [name for name in data if name],
    )


def _usable_name(raw: bytes) -> str:
    """Return a stored name as a string; empty for a name that no file can have."""
    return "" if b"\0" in raw else os.fsdecode(raw)
