"""The description of an image, which may be broken or untrusted.

Of the image only the header, the name of the backing file and the L1 table are read.  Neither numpy
nor trio is imported, because loading them would take longer than the reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, NotQedError
from qedfuse.hostio.lockedfile import locked_descriptor
from qedfuse.hostio.locking import LockMode
from qedfuse.ondisk.constants import SECTOR, Feature
from qedfuse.ondisk.formats import SIGNATURE_BYTES, is_qed
from qedfuse.remote.address import require_local, shown_name
from qedfuse.tools.common.formatprobe import is_qed_image
from qedfuse.tools.inspection.imagereader import DescriptorReader
from qedfuse.tools.inspection.l1summary import L1Summary, summarize_l1
from qedfuse.tools.inspection.nameresolution import BackingName, resolve_name
from qedfuse.tools.inspection.problems import (
    L1_DAMAGE,
    Problem,
    backing_problems,
    header_problems,
    l1_problems,
)
from qedfuse.tools.inspection.rawheader import RawHeader, read_raw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.remote.address import Address
    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.tools.inspection.imagereader import ImageReader

_NAME_FIELDS: Final = frozenset({"backing_filename_offset", "backing_filename_size"})
"""Header fields without which the backing file's name cannot be read."""


@dataclass(frozen=True, slots=True)
class QedInfo:
    """The description of a QED image.

    Attributes:
        header: All fields of the header, valid or invalid.
        backing: The backing file; None if the header names none, or the name cannot be read.
        problems: All errors and unusual properties that were found.
        l2_tables: Number of L1 entries that are not 0; None if not all of them were read.
    """

    header: RawHeader
    backing: BackingName | None
    problems: tuple[Problem, ...]
    l2_tables: int | None

    @property
    def readable(self) -> bool:
        """Whether the header is valid."""
        return not self.header.problems

    @property
    def mountable(self) -> bool:
        """Whether the image permits a mount; of the backing file only the name is examined."""
        return not any(problem.fatal for problem in self.problems)

    @property
    def sound(self) -> bool:
        """Whether all L1 entries were read and are valid; L2 entries are not examined."""
        return self.l2_tables is not None and not any(
            problem.code in L1_DAMAGE for problem in self.problems
        )

    @property
    def need_check(self) -> bool:
        """Whether NEED_CHECK is set: the image was not closed cleanly, or is being changed."""
        return bool(self.header.values.get("features", 0) & Feature.NEED_CHECK)

    @property
    def has_free_list(self) -> bool:
        """Whether the feature bit of the persistent free list is set."""
        return bool(self.header.values.get("features", 0) & Feature.FREE_LIST)

    @property
    def names_backing(self) -> bool:
        """Whether the feature bit of a backing file is set, even if the name cannot be read."""
        return bool(self.header.values.get("features", 0) & Feature.BACKING_FILE)

    @property
    def backing_escapes(self) -> bool:
        """Whether there is a backing file that may lie outside the image's directory."""
        return self.backing.escapes if self.backing is not None else False

    @property
    def max_l2_tables(self) -> int | None:
        """The number of L2 tables that the disk can use; None without a valid geometry."""
        header = self.header.header
        return None if header is None else header.geometry.l1_used(header.image_size)


@dataclass(frozen=True, slots=True)
class ForeignInfo:
    """The description of an overlay in a format that only QEMU reads.

    Attributes:
        backing: The backing file that the header names.
        backing_format: Format of the backing file, as the image states it; None if the image states
            none.
    """

    backing: BackingName
    backing_format: str | None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The description of a QED image, a raw file or an image that QEMU serves; sizes in bytes.

    Attributes:
        path: Path or URL by which the file was opened.
        format: ``qed``, ``raw``, or the name that QEMU has for another format.
        virtual_size: Size of the disk, for a raw file rounded up to whole sectors; None if a QED
            image ends before the header field ``image_size``.
        file_size: Length of the file.
        disk_usage: Space that the file uses where it is stored.
        qed: The description of a QED image; None for all other files.
        foreign: The backing file of an image that QEMU serves; None for all other files, and for an
            image without a backing file.
    """

    path: str
    format: str
    virtual_size: int | None
    file_size: int
    disk_usage: int
    qed: QedInfo | None = None
    foreign: ForeignInfo | None = None

    @property
    def backing(self) -> BackingName | None:
        """The backing file that the image names; None if its name is missing or cannot be read."""
        if self.foreign is not None:
            return self.foreign.backing
        return None if self.qed is None else self.qed.backing

    @property
    def backing_format(self) -> str | None:
        """Format of the backing file, as the image states it; None if the image states none."""
        if self.foreign is not None:
            return self.foreign.backing_format
        return "raw" if self.backing is not None and self.backing.is_raw else None


def describe(
    path: str,
    image_format: FormatChoice = "auto",
    *,
    lock: LockMode | None = LockMode.READ,
    allowed: Sequence[Address] = (),
) -> ImageInfo:
    """Return the description of a file, even of an image that cannot be mounted.

    If the L1 table or the name of the backing file cannot be read, a `Problem` says so.

    Args:
        path: The file.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        lock: The mode in which to lock the file; None to take no lock.
        allowed: The prefixes of URLs that the user has allowed for backing files.

    Raises:
        UsageError: The file is a URL, which `qedfuse.tools.inspection.chaininfo` can describe.
        NotQedError: The file has no QED magic although ``image_format`` is ``qed``, or
            ``image_format`` is ``auto`` and the file is of a foreign format.
        QedError: The file cannot be opened, or its beginning cannot be read.
    """
    require_local(path)
    with locked_descriptor(path, lock) as fd:
        try:
            return describe_open(DescriptorReader(fd), path, image_format, allowed)
        except OSError as error:
            raise HostError.from_os(error, shown_name(path), "read") from error


def describe_open(
    image: ImageReader,
    path: str,
    image_format: FormatChoice = "auto",
    allowed: Sequence[Address] = (),
) -> ImageInfo:
    """Return the description of a file that the caller has opened, and locked if necessary.

    Args:
        image: The file.
        path: Path or URL by which the file was opened.
        image_format: Format of the file; ``auto`` detects the format from the first bytes.
        allowed: The prefixes of URLs that the user has allowed for backing files.

    Raises:
        NotQedError: See `describe`.
        OSError: The beginning of the file cannot be read.
        RemoteError: The file is a URL, and the server does not give what is needed.
    """
    name = shown_name(path)
    file_size, usage = image.size, image.disk_usage
    signature = image.read(0, SIGNATURE_BYTES)  # includes the whole header of a QED image
    if not is_qed_image(signature, image_format, name):
        size = -(-file_size // SECTOR) * SECTOR
        return ImageInfo(path, "raw", size, file_size, usage)
    if not is_qed(signature):
        msg = f"{name}: not a QED image: found no QED magic at the file's beginning"
        raise NotQedError(msg)
    raw = read_raw(signature, file_size, name)
    header = raw.header
    l1 = L1Summary() if header is None else summarize_l1(image, header)
    backing = _read_backing(image, raw, path)
    problems = (
        *header_problems(raw, file_size, name),
        *l1_problems(l1, file_size, name),
        *backing_problems(raw, backing, name, allowed),
    )
    known = backing if isinstance(backing, BackingName) else None
    info = QedInfo(raw, known, problems, l1.used if l1.complete else None)
    return ImageInfo(path, "qed", raw.values.get("image_size"), file_size, usage, info)


def _read_backing(image: ImageReader, raw: RawHeader, path: str) -> BackingName | str | None:
    """Read and resolve the name of the backing file.

    Returns a text with the reason if the host cannot read the name.  Returns None if the header has
    no valid name.
    """
    header = raw.header
    refused = {getattr(error, "field", "") for error in raw.problems}
    if header is None or not header.has_backing or refused & _NAME_FIELDS:
        return None
    try:
        name = image.read(header.backing_filename_offset, header.backing_filename_size)
    except OSError as error:
        return error.strerror or str(error)
    return resolve_name(name, path, raw_format=header.backing_is_raw)
