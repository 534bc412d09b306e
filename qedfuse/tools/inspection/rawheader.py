"""A header as stored in the file, valid or invalid, and the errors in the header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qedfuse.errors import HeaderError, NotQedError, QedError, UnsupportedError
from qedfuse.ondisk.constants import (
    HEADER_BYTES,
    KNOWN_FEATURES,
    Feature,
)
from qedfuse.ondisk.geometry import SIZE_LIMITS, expected_size
from qedfuse.ondisk.header import HEADER_STRUCT, Header, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_PROBLEMS: Final = 16
"""Maximum number of errors that are reported.  A header has fewer fields."""

_GEOMETRY_FIELDS: Final = frozenset(SIZE_LIMITS)
"""The sizes of clusters and tables.  Without valid sizes other fields cannot be examined."""


@dataclass(frozen=True, slots=True)
class HeaderField:
    """One field: its name, its offset and length in bytes, and its value."""

    name: str
    offset: int
    length: int
    value: int


@dataclass(frozen=True, slots=True)
class Bits:
    """The value of a field of feature bits.

    Attributes:
        value: The value of the field.
        names: Names of the known bits that are set.
        unknown: Numbers of the unknown bits that are set; the lowest bit has number 0.
    """

    value: int
    names: tuple[str, ...] = ()
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RawHeader:
    """The header in the first bytes of a QED image.

    Attributes:
        fields: The fields that lie wholly in the file, in order.
        problems: An error for each invalid field; empty if the header is valid.  If the geometry
            is invalid, other errors may be missing.
        header: The fields as a header, even if some are invalid.  None if the file ends within
            the header, or the geometry is invalid.
        values: The values of ``fields`` by name.
    """

    fields: tuple[HeaderField, ...]
    problems: tuple[QedError, ...]
    header: Header | None
    values: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Set ``values`` from the fields."""
        object.__setattr__(self, "values", {item.name: item.value for item in self.fields})

    def bits(self, name: str) -> Bits:
        """Return the bits that are set in the field ``name``; none if the file is too short.

        Only bits of the field ``features`` have names; others count as unknown.
        """
        value = self.values.get(name, 0)
        known = tuple(Feature) if name == "features" else ()
        names = tuple(str(bit.name).lower() for bit in known if value & bit)
        rest = value & ~KNOWN_FEATURES if known else value
        return Bits(value, names, tuple(bit for bit in range(64) if rest >> bit & 1))


def read_raw(data: bytes, file_size: int, name: str) -> RawHeader:
    """Parse a header, and return its errors instead of raising them.

    Args:
        data: The first bytes of the file, which begin with the QED magic.
        file_size: Length of the file in bytes.
        name: Name of the file in messages.
    """
    fields = tuple(_fields(data[:HEADER_BYTES]))
    if len(data) < HEADER_BYTES:
        try:
            parse_header(data, name)
        except NotQedError as error:
            return RawHeader(fields, (error,), None)
    values = {item.name: item.value for item in fields if item.name != "magic"}
    header = Header(**values) if _has_geometry(values) else None
    return RawHeader(fields, tuple(_problems(data[:HEADER_BYTES], file_size, name)), header)


def _fields(data: bytes) -> Iterator[HeaderField]:
    """Yield the fields that lie wholly in ``data``."""
    offset = 0
    for item in HEADER_STRUCT.subcons:
        length = item.sizeof()
        if offset + length > len(data):
            return
        value = int.from_bytes(data[offset : offset + length], "little")
        yield HeaderField(item.name, offset, length, value)
        offset += length


def _has_geometry(values: Mapping[str, int]) -> bool:
    """Return whether the sizes of clusters and tables in ``values`` are valid."""
    return all(expected_size(name, values[name]) is None for name in SIZE_LIMITS)


def _problems(data: bytes, file_size: int, name: str) -> Iterator[QedError]:
    """Yield the errors because of which qedfuse would refuse the image.

    `parse_header` has the rules, but raises only the first error.  So after each error, the invalid
    value is replaced by a valid one, and the header is parsed again.  After an error in the
    geometry the search ends.  `Header.check_fits` is not called with a replaced offset of the L1
    table, because its error would not be about the stored value.
    """
    fields = HEADER_STRUCT.parse(data)
    l1_was_replaced = False
    for _ in range(_MAX_PROBLEMS):
        try:
            header = parse_header(HEADER_STRUCT.build(fields), name)
            if not l1_was_replaced:
                header.check_fits(file_size, name)
        except UnsupportedError as error:
            yield error
            fields.features &= KNOWN_FEATURES
        except HeaderError as error:
            yield error
            if error.field in _GEOMETRY_FIELDS:
                return
            l1_was_replaced = l1_was_replaced or error.field == "l1_table_offset"
            _make_valid(fields, error.field)
        else:
            return


def _make_valid(fields: Any, name: str) -> None:  # noqa: ANN401  construct's own kind of record
    """Replace a refused value by one with which other fields can be validated."""
    cluster_size = fields.cluster_size
    if name == "l1_table_offset":
        fields.l1_table_offset = max(1, fields.header_size) * cluster_size
    elif name == "header_size":
        fields.header_size = fields.l1_table_offset // cluster_size
    elif name == "image_size":
        fields.image_size = 0
    else:  # the offset or length of the backing file's name; without a name both are valid
        fields.backing_filename_size = 0
