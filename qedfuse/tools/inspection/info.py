"""What an image is, for people and for services that are handed images by strangers.

Nothing but the image itself is opened, and of it only the header, the backing file's name
and the L1 table are read: no numpy, no trio, so that the answer is there in an instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from qedfuse.check.headernotes import header_notes
from qedfuse.errors import HostError, NotQedError, QedError
from qedfuse.hostio.lockedfile import locked_descriptor
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.sparse import data_slices
from qedfuse.ondisk.constants import MAX_OFFSET, SECTOR, UNALLOCATED, Feature
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.formats import SIGNATURE_BYTES, is_qed
from qedfuse.ondisk.table import SLICE_BYTES, decode
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import is_qed_image
from qedfuse.tools.inspection.nameresolution import BackingName, resolve_name
from qedfuse.tools.inspection.rawheader import RawHeader, read_raw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.ondisk.header import Header

Format: TypeAlias = Literal["auto", "qed", "raw"]

MAX_L1_BYTES: Final = 8 << 20
"""Bytes of an L1 table that are looked at, zeros not counted; the default one has 256 KiB."""


_NAME_FIELDS: Final = frozenset({"backing_filename_offset", "backing_filename_size"})

_DAMAGE: Final = frozenset({"l1-wild", "table-overlap"})
"""Problems with the L1 table: parts of the disk cannot be read, or not be written to safely."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong or odd, in one line.

    Attributes:
        code: The word for scripts.
        fatal: Whether the image is refused for it.
    """

    code: str
    message: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class QedInfo:
    """What is only to be said of QED images.

    Attributes:
        header: All fields, right or wrong.
        backing: The backing file that is named, if one is.
        problems: What is wrong; empty for a sound image that was closed cleanly.
        l2_tables: L1 entries in use; None if the table could not be read, or not all of it.
    """

    header: RawHeader
    backing: BackingName | None
    problems: tuple[Problem, ...]
    l2_tables: int | None

    @property
    def readable(self) -> bool:
        """Whether the tables can be read: the header says nothing impossible."""
        return not self.header.problems

    @property
    def mountable(self) -> bool:
        """Whether nothing about the file itself is in the way of a mount, read-only at least."""
        return not any(problem.fatal for problem in self.problems)

    @property
    def sound(self) -> bool:
        """Whether all L1 entries were read, and none is wrong: L2 tables are not looked at."""
        return self.l2_tables is not None and not any(
            problem.code in _DAMAGE for problem in self.problems
        )

    @property
    def need_check(self) -> bool:
        """Whether the image was not closed cleanly."""
        return bool(self.header.values.get("features", 0) & Feature.NEED_CHECK)

    @property
    def has_free_list(self) -> bool:
        """Whether the image says that it keeps a list of its free clusters."""
        return bool(self.header.values.get("features", 0) & Feature.FREE_LIST)

    @property
    def names_backing(self) -> bool:
        """Whether the image says that it has a base, even if it does not say which."""
        return bool(self.header.values.get("features", 0) & Feature.BACKING_FILE)

    @property
    def escapes(self) -> bool:
        """Whether the base is not plainly a file inside the image's directory."""
        return self.backing.escapes if self.backing is not None else False

    @property
    def max_l2_tables(self) -> int | None:
        """How many L2 tables the disk can use; None where the header makes no sense."""
        header = self.header.header
        return None if header is None else header.geometry.l1_used(header.image_size)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What a file is; sizes in bytes.

    Attributes:
        path: The file as it was named.
        virtual_size: Size of the disk; None if the header is too short to tell.
        file_size: Length of the file.
        disk_usage: What the file takes up on the host.
        qed: None for a raw file.
    """

    path: str
    format: Literal["qed", "raw"]
    virtual_size: int | None
    file_size: int
    disk_usage: int
    qed: QedInfo | None = None


def describe(path: str, image_format: Format = "auto", *, share: bool = False) -> ImageInfo:
    """Describe an image, one that must not be mounted as well; with ``share`` beside a writer.

    Raises:
        NotQedError: It is of a foreign format, or it is not QED and was said to be.
        ImageInUseError: Another program writes to it.
        QedError: It cannot be opened or read.
    """
    with locked_descriptor(path, LockMode.to_read(share=share)) as fd:
        try:
            return describe_open(fd, path, image_format)
        except OSError as error:
            raise HostError.from_os(error, printable(path), "read") from error


def describe_open(fd: int, path: str, image_format: Format = "auto") -> ImageInfo:
    """Describe an image that is open, and locked if it is to be.

    Raises:
        NotQedError: As `describe`.
        OSError: The file cannot be read.
    """
    name = printable(path)
    status = os.fstat(fd)
    start = os.pread(fd, SIGNATURE_BYTES, 0)  # more than a header
    usage = status.st_blocks * 512
    if not is_qed_image(start, image_format, name):
        size = -(-status.st_size // SECTOR) * SECTOR
        return ImageInfo(path, "raw", size, status.st_size, usage)
    if not is_qed(start):
        msg = f"{name}: not a QED image: found no QED magic, expected it at the file's beginning"
        raise NotQedError(msg)
    raw = read_raw(start, status.st_size, name)
    tables, table_problems = _look_at_l1(fd, raw.header, status.st_size, name)
    backing = _backing(fd, raw, path)
    problems = (
        *_header_problems(raw, status.st_size, name),
        *table_problems,
        *_backing_problems(raw, backing, name),
    )
    info = QedInfo(raw, backing, problems, tables)
    return ImageInfo(path, "qed", raw.values.get("image_size"), status.st_size, usage, info)


def _header_problems(raw: RawHeader, file_size: int, name: str) -> Iterator[Problem]:
    """Say what is wrong with the header, and what is only odd."""
    for error in raw.problems:
        yield Problem(_word(error), str(error), fatal=True)
    if raw.header is not None:
        for finding in header_notes(raw.header, file_size, name):
            yield Problem(finding.code.value, finding.message, fatal=False)


def _word(error: QedError) -> str:
    """Give the word for scripts for a refusal."""
    field = getattr(error, "field", None)
    if field is not None:
        return f"bad-{field.replace('_', '-')}"
    return "truncated-header" if isinstance(error, NotQedError) else "unknown-features"


def _look_at_l1(
    fd: int, header: Header | None, file_size: int, name: str
) -> tuple[int | None, list[Problem]]:
    """Count the L1 entries in use, and say how many of them cannot be right.

    Returns:
        The count, None if not all of the table was read; and what is wrong.
    """
    if header is None or header.l1_table_offset > MAX_OFFSET:
        return None, []
    limits = EntryLimits.for_l1(header, file_size)
    used = wild = 0
    tables: list[int] = []
    start, left, complete = header.l1_table_offset, MAX_L1_BYTES, True
    end = min(header.l1_end, file_size)
    for offset in data_slices(fd, start, end - start):
        raw = os.pread(fd, min(SLICE_BYTES, end - offset), offset) if left > 0 else b""
        if not raw:
            complete = False
            break
        if raw.count(0) == len(raw):
            continue
        left -= SLICE_BYTES
        entries = decode(raw[: len(raw) & -8])
        found = [value for value in entries if value != UNALLOCATED]
        good = [value for value in found if limits.is_valid(value)]
        used += len(found)
        wild += len(found) - len(good)
        tables += good
    problems = list(_l1_problems(wild, _overlapping(tables, header), file_size, name))
    return used if complete else None, problems


def _overlapping(tables: list[int], header: Header) -> int:
    """Count the tables that share clusters with one before them in the file."""
    found, end = 0, 0
    for table in sorted(tables):
        if table < end:
            found += 1
        else:
            end = table + header.geometry.table_bytes
    return found


def _l1_problems(wild: int, overlapping: int, file_size: int, name: str) -> Iterator[Problem]:
    """Say how many L1 entries cannot be right; a mount refuses only what they describe."""
    if wild:
        msg = (
            f"{name}: L1 table: found {wild} entries that point to no table, expected offsets of "
            f"whole tables inside the file of {file_size} bytes, past the header and the L1 table"
        )
        yield Problem("l1-wild", msg, fatal=False)
    if overlapping:
        msg = (
            f"{name}: L1 table: found {overlapping} tables that share clusters with another, "
            "expected each to have its clusters for itself"
        )
        yield Problem("table-overlap", msg, fatal=False)


def _backing(fd: int, raw: RawHeader, path: str) -> BackingName | None:
    """Read the name of the backing file, if there is one that can be read."""
    header = raw.header
    refused = {getattr(error, "field", "") for error in raw.problems}
    if header is None or not header.has_backing or refused & _NAME_FIELDS:
        return None
    name = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
    return resolve_name(name, path, raw_format=header.backing_is_raw)


def _backing_problems(raw: RawHeader, backing: BackingName | None, name: str) -> Iterator[Problem]:
    """Say what no mount would accept about a backing file's name."""
    if backing is None:
        return
    found, expected = len(os.fsencode(backing.name)), raw.values["backing_filename_size"]
    if found < expected:
        msg = f"{name}: backing file name: found {found} bytes of it, expected {expected}"
        yield Problem("backing-name-cut-short", msg, fatal=True)
    shown = printable(backing.name)
    if backing.scheme is not None:
        msg = f"{name}: backing file {shown}: found a protocol, expected a plain path"
        yield Problem("backing-scheme", msg, fatal=True)
    if "\0" in backing.name:
        msg = f"{name}: backing file name: found a NUL byte in {shown}"
        yield Problem("backing-nul", msg, fatal=True)
