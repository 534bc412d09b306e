"""The text of ``qedimg info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.remote.address import shown_name
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.tools.inspection.details import Details
    from qedfuse.tools.inspection.info import ImageInfo, QedInfo
    from qedfuse.tools.inspection.nameresolution import BackingName
    from qedfuse.tools.inspection.rawheader import Bits

_FEATURE_FIELDS = {"features": "incompatible", "compat_features": "compatible",
                   "autoclear_features": "autoclear"}  # fmt: skip
"""The title of each header field of feature bits."""


def as_text(image: ImageInfo, details: Details | None) -> str:
    """Return the description of an image as text; its first lines have qemu-img's form.

    ``details`` is None if the tables and the free list were not read.
    """
    return "\n".join(_lines(image, details))


def _lines(image: ImageInfo, details: Details | None) -> Iterator[str]:
    """Yield the lines of the description.

    Every image has the lines up to the disk size.  An image that QEMU serves also has those about
    its backing file, if it names one.  Only a QED image can have the others.
    """
    yield f"image: {shown_name(image.path)}"
    yield f"file format: {image.format}"
    size = image.virtual_size
    yield f"virtual size: {'unknown' if size is None else _readable_and_exact(size)}"
    yield f"disk size: {format_size(image.disk_usage)}"
    qed = image.qed
    if qed is not None and "cluster_size" in qed.header.values:
        yield f"cluster_size: {qed.header.values['cluster_size']}"
    if image.backing is not None:
        yield from _backing(image.backing, image.backing_format)
    if qed is None:
        return
    yield "Format specific information:"
    yield from (f"    {line}" for line in _qed_properties(image, qed, details))
    if qed.problems:
        yield "problems:"
        yield from (f"    {item.message}" for item in qed.problems)


def _readable_and_exact(size: int) -> str:
    """Return a size with a unit and in bytes."""
    return f"{format_size(size)} ({size} bytes)"


def _backing(backing: BackingName, backing_format: str | None) -> Iterator[str]:
    """Describe the backing file: its name, its path, and its format if the image states one."""
    actual = "" if backing.path == backing.name else f" (actual path: {shown_name(backing.path)})"
    yield f"backing file: {shown_name(backing.name)}{actual}"
    if backing_format is not None:
        yield f"backing file format: {backing_format}"


def _qed_properties(image: ImageInfo, qed: QedInfo, details: Details | None) -> Iterator[str]:
    """Describe the length of the file, and the properties that only a QED image has."""
    yield f"file length: {_readable_and_exact(image.file_size)}"
    for name, unit in (("table_size", "clusters"), ("header_size", "clusters")):
        if name in qed.header.values:
            yield f"{name.replace('_', ' ')}: {qed.header.values[name]} {unit}"
    for name, title in _FEATURE_FIELDS.items():
        bits = qed.header.bits(name)
        if bits.value or name == "features":
            yield f"{title} features: {_bits(bits)}"
    yield f"need check: {'yes' if qed.need_check else 'no'}"
    yield f"free list: {_free_list(qed, details)}"
    separator = ", " if qed.l2_tables is None else " of "
    possible = "" if qed.max_l2_tables is None else f"{separator}{qed.max_l2_tables} possible"
    count = "not counted" if qed.l2_tables is None else str(qed.l2_tables)
    yield f"L2 tables: {count}{possible}"
    if details is not None and details.allocation is not None:
        yield f"data clusters: {details.allocation.data}"
        yield f"zero clusters: {details.allocation.zero}"
    if qed.backing is not None:
        where = "may be outside" if qed.backing.escapes else "is inside"
        yield f"resolved backing file: {shown_name(qed.backing.resolved)}"
        yield f"backing file {where} the image's directory"


def _bits(bits: Bits) -> str:
    """Return feature bits as a number, with the name of each bit that is set."""
    words = [*bits.names, *(f"unknown bit {number}" for number in bits.unknown)]
    return f"0x{bits.value:x}" + (f" ({', '.join(words)})" if words else "")


def _free_list(qed: QedInfo, details: Details | None) -> str:
    """Describe the persistent free list, or only its presence if the list was not read."""
    if not qed.has_free_list:
        return "none"
    found = None if details is None else details.free_list
    if found is None:
        return "present, not read"
    if not found.valid:
        return f"not valid: {found.problem}"
    return f"{found.clusters} clusters ({format_size(found.bytes)}) in {found.runs} runs"
