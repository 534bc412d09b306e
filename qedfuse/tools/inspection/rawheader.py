"""A header as it stands in the file, right or wrong, and everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qedfuse.errors import HeaderError, NotQedError, QedError, UnsupportedError
from qedfuse.ondisk.constants import (
    HEADER_BYTES,
    KNOWN_FEATURES,
    MAX_CLUSTER_SIZE,
    MAX_OFFSET,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    Feature,
)
from qedfuse.ondisk.header import HEADER_STRUCT, Header, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_PROBLEMS: Final = 16
_GEOMETRY_FIELDS: Final = frozenset({"cluster_size", "table_size"})
"""Fields without which the others mean nothing."""


@dataclass(frozen=True, slots=True)
class HeaderField:
    """One field: its name, where it lies, how long it is (in bytes), and its value."""

    name: str
    offset: int
    length: int
    value: int


@dataclass(frozen=True, slots=True)
class Bits:
    """A set of feature bits: the number, the names of those that have one, and the others."""

    value: int
    names: tuple[str, ...] = ()
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RawHeader:
    """What the first bytes of a QED image say.

    Attributes:
        fields: The fields that the file is long enough for, in order.
        problems: What each of those that are wrong should be, one line each.
        header: The same as one value, whatever is wrong; None if the tables cannot be
            cut up by it: the file is too short, or the geometry out of range.
    """

    fields: tuple[HeaderField, ...]
    problems: tuple[QedError, ...]
    header: Header | None
    values: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the fields' values known by their names."""
        object.__setattr__(self, "values", {item.name: item.value for item in self.fields})

    def bits(self, name: str) -> Bits:
        """Tell which bits of a field of features are set."""
        value = self.values.get(name, 0)
        known = tuple(Feature) if name == "features" else ()
        names = tuple(str(bit.name).lower() for bit in known if value & bit)
        rest = value & ~KNOWN_FEATURES if known else value
        return Bits(value, names, tuple(bit for bit in range(64) if rest >> bit & 1))


def read_raw(data: bytes, file_size: int, name: str) -> RawHeader:
    """Read the header of a file of ``file_size`` bytes, called ``name`` in messages.

    ``data`` are its first bytes, which begin with the QED magic.
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
    offset = 0
    for item in HEADER_STRUCT.subcons:
        length = item.sizeof()
        if offset + length > len(data):
            return
        value = int.from_bytes(data[offset : offset + length], "little")
        yield HeaderField(item.name, offset, length, value)
        offset += length


def _has_geometry(values: Mapping[str, int]) -> bool:
    """Tell whether clusters and tables have sizes that can be computed with."""
    limits = {
        "cluster_size": (MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE),
        "table_size": (MIN_TABLE_SIZE, MAX_TABLE_SIZE),
    }
    return all(
        least <= values[name] <= most and not values[name] & (values[name] - 1)
        for name, (least, most) in limits.items()
    )


def _problems(data: bytes, file_size: int, name: str) -> Iterator[QedError]:
    """Find everything for which the image would be refused, not just the first thing.

    Each time a field is refused, the next look is at a header in which it is harmless.  So
    there is one judge of headers, and nothing is said here that he would not say.
    """
    fields = HEADER_STRUCT.parse(data)
    moved = False
    for _ in range(_MAX_PROBLEMS):
        try:
            header = parse_header(HEADER_STRUCT.build(fields), name)
            if not moved:
                header.check_fits(file_size, name)
        except UnsupportedError as error:
            yield error
            fields.features &= KNOWN_FEATURES
        except HeaderError as error:
            yield error
            if error.field in _GEOMETRY_FIELDS:
                return
            moved = moved or error.field == "l1_table_offset"
            _mend(fields, error.field)
        else:
            return


def _mend(fields: Any, name: str) -> None:  # noqa: ANN401  construct's own kind of record
    """Give a field that was refused a value with which the others can be judged."""
    size = fields.cluster_size
    if name == "l1_table_offset":
        # A header that reserves absurdly much is a problem of its own.
        fields.l1_table_offset = min(max(1, fields.header_size) * size, MAX_OFFSET // size * size)
    elif name == "header_size":
        fields.header_size = fields.l1_table_offset // size
    elif name == "image_size":
        fields.image_size = 0
    else:
        fields.backing_filename_size = 0
