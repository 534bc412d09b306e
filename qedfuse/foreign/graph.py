"""Opening the files of a chain in QEMU's formats, and the options by which QEMU reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import BackingError, ForeignError
from qedfuse.foreign.links import MAX_EXTENTS, RAW_DRIVERS, Links, read_links
from qedfuse.foreign.sandbox import FIRST_FILE_DESCRIPTOR
from qedfuse.foreign.vmdk import refuse_hidden_descriptor
from qedfuse.ondisk.formats import DRIVERS, SIGNATURE_BYTES, detected_driver
from qedfuse.text import printable
from qedfuse.util.deferredclose import close_all
from qedfuse.util.landlock import landlock_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeAlias

    from qedfuse.hostio.posixfile import PosixFile

    Opener: TypeAlias = Callable[[bytes, "PosixFile"], "PosixFile"]
    """Opens a file that an image names, by this name and the open file of the image.  Raises
    BackingError to refuse the named file."""

    Options: TypeAlias = dict[str, object]
    """Options of a block node of QEMU, as for its option ``--blockdev``."""

_MAX_FILES: Final = 64
"""Maximum number of files in a chain, not counting the extents of VMDK images."""

_DRIVERS: Final = ("raw", "qed", *DRIVERS.values())
_OVERLAY_DRIVERS: Final = ("qed", "qcow", "qcow2", "vmdk")
"""The formats whose images can have a base.  Unless the options say otherwise, QEMU opens the base
that the header of such an image names."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Which files images may name, and how these files are locked.

    Attributes:
        open_named: Opens a file that an image names, or refuses the file.
        any_file: Whether images may name any file.  If False, and the kernel has no Landlock to
            confine QEMU, images may name no file at all.
        lock: Whether QEMU locks the files.
        share: Whether to read files that another program has open for writing.
    """

    open_named: Opener
    any_file: bool = False
    lock: bool = True
    share: bool = False


@dataclass(frozen=True, slots=True)
class ChainImage:
    """An image of a chain.

    Attributes:
        file: The open file of the image.
        driver: The format of the image as QEMU calls it.
        links: The names of other files that were read from its header.
        options: The options of its block node, without those for its base.
    """

    file: PosixFile
    driver: str
    links: Links
    options: Options


@dataclass(slots=True)
class _OpenedFiles:
    """The open files of a chain.

    Attributes:
        files: The files that QEMU gets as descriptors, the image itself first.  A VMDK image that
            names extents is among them, but QEMU opens it by its path.
        extents: The extents of VMDK images, which QEMU opens by their names.
        data_files: For each image, from the top one down, the file that has its data; None if
            extents have it.
        opened: The files that `close` closes: all except the image itself.
        images: The images, from the top one down.
    """

    files: list[PosixFile] = field(default_factory=list)
    extents: list[PosixFile] = field(default_factory=list)
    data_files: list[PosixFile | None] = field(default_factory=list)
    opened: list[PosixFile] = field(default_factory=list)
    images: list[ChainImage] = field(default_factory=list)

    def close(self) -> None:
        """Close the files that were opened for the graph."""
        close_all(self.opened)


@dataclass(slots=True, kw_only=True)
class Graph(_OpenedFiles):
    """The open files of a chain, and the options by which QEMU reads the chain.

    Attributes:
        options: The options of the block node of the image.
    """

    options: Options

    def refuse_changes(self) -> None:
        """Refuse the chain if an image has other links or another format than in the graph.

        QEMU reads the links later than `open_graph`, and locks the files later.  Without Landlock,
        a program that changes an image in between could make QEMU open other files.  A base that
        gets its header in between would be shown in its former format, for example as raw.  So the
        caller must call this method after QEMU has opened all images.  A program that restores the
        links before this call is not detected.

        Raises:
            ForeignError: An image names other files, has another format, or cannot be used any
                more.
            BackingError: An image states an unknown format of its base.
            ImageError: The header of a QED image is not valid any more.
            HostError: A file cannot be read.
        """
        for image in self.images:
            if read_links(image.file.fd, image.driver, image.file.name) != image.links:
                msg = (
                    f"{image.file.name}: found other names of files than when it was opened, "
                    "expected an image that no program changes"
                )
                raise ForeignError(msg)
        for image, base in pairwise(self.images):
            found = _base_driver(base.file, image.file, image.links)
            if found != base.driver:
                msg = (
                    f"{base.file.name}: found format {found}, expected {base.driver} as when it "
                    "was opened"
                )
                raise ForeignError(msg)
        for extent in self.extents:
            refuse_hidden_descriptor(_signature(extent), extent.name)


def open_graph(file: PosixFile, driver: str, limits: Limits) -> Graph:
    """Open all files that an image and its bases name; the caller must close the graph.

    Args:
        file: The open file of the image, which the graph does not close, except its directory.
        driver: The format of the image as QEMU calls it.
        limits: Which files the images may name.

    Raises:
        BackingError: A file is missing or refused, an image states an unknown format of its backing
            file, or the chain is a loop or too long.
        ForeignError: An image is encrypted or damaged, has too many extents, or names a file
            although there is no Landlock (`Limits.any_file`).
        ImageError: The header of a QED image is not valid.
        HostError: A file cannot be read.
    """
    opened = _OpenedFiles()
    try:
        options = _add_image(opened, file, driver, limits)
    except BaseException:
        opened.close()
        raise
    return Graph(
        options=options,
        files=opened.files,
        extents=opened.extents,
        data_files=opened.data_files,
        opened=opened.opened,
        images=opened.images,
    )


def _add_image(graph: _OpenedFiles, file: PosixFile, driver: str, limits: Limits) -> Options:
    """Add an image and all files that it names; return the options of the image's block node."""
    graph.files.append(file)
    links = read_links(file.fd, driver, file.name)
    if links and not limits.any_file and not landlock_version():
        named = links.backing or links.data_file or links.extents[0]
        msg = (
            f"{file.name}: found the name of another file, {printable(named)}, expected none, "
            "because this kernel has no Landlock to confine QEMU (backing=any allows it)"
        )
        raise ForeignError(msg)
    # QEMU takes the names of extents as relative to the path by which it has opened the image.  So
    # QEMU must open such an image by its own path, and not as an inherited descriptor.
    path = str(Path(file.path).absolute()) if links.extents else _inherited_path(graph)
    options = _image_options(driver, _file_options(path, limits), limits)
    for name in links.extents:
        if len(graph.extents) >= MAX_EXTENTS:
            msg = f"{file.name}: found more than {MAX_EXTENTS} extents in the chain"
            raise ForeignError(msg)
        # An image may name an extent twice, even by two spellings.  So the extents that are open
        # already do not count as taken.
        extent = _open(graph, name, file, limits, role="extent", taken=graph.files)
        extent.close_directory()  # an extent names no file
        graph.extents.append(extent)
        refuse_hidden_descriptor(_signature(extent), extent.name)
    graph.data_files.append(None if links.extents else file)
    if links.data_file:
        data = _open_counted(graph, links.data_file, file, limits, role="data file")
        data.close_directory()
        graph.files.append(data)
        graph.data_files[-1] = data
        options["data-file"] = _file_options(_inherited_path(graph), limits)
    if driver in _OVERLAY_DRIVERS:
        options["backing"] = None
    graph.images.append(ChainImage(file, driver, links, options))
    base = None
    if links.backing:
        base = _open_counted(graph, links.backing, file, limits, role="backing file")
    file.close_directory()
    if base is not None:
        below = _add_image(graph, base, _base_driver(base, file, links), limits)
        return {**options, "backing": below}
    return options


def _inherited_path(graph: _OpenedFiles) -> str:
    """Return the path by which QEMU opens the last of ``graph.files``, an inherited descriptor."""
    return f"/proc/self/fd/{FIRST_FILE_DESCRIPTOR + len(graph.files) - 1}"


def _image_options(driver: str, file: Options, limits: Limits) -> Options:
    """Return the options of an image's block node, except those for its backing and data file."""
    share: Options = {"force-share": True} if limits.share else {}
    return {"driver": driver, "read-only": True, "file": file, **share}


def _file_options(path: str, limits: Limits) -> Options:
    """Return the options of the block node that reads the file at ``path``."""
    return {
        "driver": "file",
        "filename": path,
        "locking": "on" if limits.lock else "off",
        "read-only": True,
    }


def _open(
    graph: _OpenedFiles,
    name: bytes,
    image: PosixFile,
    limits: Limits,
    *,
    role: str,
    taken: Iterable[PosixFile],
) -> PosixFile:
    """Open a file that an image names; refuse it as a loop if it is one of ``taken``.

    ``role`` says in messages what the file is for the image.
    """
    file = limits.open_named(name, image)
    graph.opened.append(file)
    if any(file.identity == other.identity for other in taken):
        msg = f"{image.name}: {role} {file.name}: found a loop in the chain"
        raise BackingError(msg)
    return file


def _open_counted(
    graph: _OpenedFiles, name: bytes, image: PosixFile, limits: Limits, *, role: str
) -> PosixFile:
    """Open a base or a data file like `_open`; refuse a chain of more than `_MAX_FILES` files."""
    file = _open(graph, name, image, limits, role=role, taken=(*graph.files, *graph.extents))
    if len(graph.files) >= _MAX_FILES:
        msg = f"{image.name}: {role} {file.name}: found a chain of more than {_MAX_FILES} files"
        raise BackingError(msg)
    return file


def _base_driver(base: PosixFile, image: PosixFile, links: Links) -> str:
    """Return the format of a backing file as QEMU calls it."""
    stated = links.backing_driver
    if stated in RAW_DRIVERS:
        return "raw"
    if stated in _DRIVERS:
        return stated
    if stated is not None:
        msg = (
            f"{image.name}: backing file {base.name}: found format {printable(stated)}, "
            f"expected {', '.join(_DRIVERS)}"
        )
        raise BackingError(msg)
    return detect_driver(base)


def detect_driver(file: PosixFile) -> str:
    """Return the format of a file as QEMU calls it, detected from the first bytes.

    Raises:
        HostError: The file cannot be read.
    """
    return detected_driver(_signature(file))


def _signature(file: PosixFile) -> bytes:
    """Return the first bytes of a file."""
    start = bytearray(SIGNATURE_BYTES)
    length = file.read_blocking(0, memoryview(start))
    return bytes(start[:length])
