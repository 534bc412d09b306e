"""Notes about properties of an image that are valid but unusual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.check.findings import Code, Finding
from qedfuse.ondisk.constants import HEADER_BYTES, Feature

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.ondisk.header import Header


def header_notes(header: Header, file_size: int, name: str) -> Iterator[Finding]:
    """Yield a note for each value of a header field that is valid, but unusual.

    QEMU accepts such values, but never leaves one in an image that it has created and closed.  If
    the length of the file is not a multiple of the cluster size, one more note says so.

    Args:
        header: The header.
        file_size: Length of the file in bytes.
        name: Name of the file in messages.
    """
    has_backing_bit = bool(header.features & Feature.BACKING_FILE)
    name_offset = header.backing_filename_offset
    compat, autoclear = header.compat_features, header.stale_autoclear
    notes = (
        (not header.header_size, Code.HEADER_SIZE_ZERO, "header_size", 0, "at least 1"),
        (
            header.has_backing and name_offset < HEADER_BYTES,
            Code.NAME_IN_FIXED_HEADER,
            "backing_filename_offset",
            name_offset,
            f"at least {HEADER_BYTES}",
        ),
        (
            has_backing_bit and not header.has_backing,
            Code.BACKING_NAME_EMPTY,
            "backing_filename_size",
            0,
            "a name, since bit 0 of the features is set",
        ),
        (
            header.backing_is_raw and not has_backing_bit,
            Code.NO_PROBE_WITHOUT_BACKING,
            "features",
            "bit 2 (raw backing file) without bit 0 (backing file)",
            "bit 2 only together with bit 0",
        ),
        (
            header.need_check,
            Code.NEED_CHECK_SET,
            "features",
            "NEED_CHECK (bit 1), left by a crash or by a program that has the image open",
            "an image that was closed cleanly",
        ),
        (
            compat != 0,
            Code.UNKNOWN_COMPAT,
            "compat_features",
            f"unknown bits 0x{compat:x}, which are kept",
            "none",
        ),
        (
            autoclear != 0,
            Code.UNKNOWN_AUTOCLEAR,
            "autoclear_features",
            f"unknown bits 0x{autoclear:x}, which the first change clears",
            "none",
        ),
    )
    for applies, code, field, found, expected in notes:
        if applies:
            text = f"{name}: header field {field}: found {found}, expected {expected}"
            yield Finding(code, text)
    if header.geometry.in_cluster(file_size):
        text = f"{name}: file size: found {file_size}, expected a multiple of {header.cluster_size}"
        yield Finding(Code.ODD_TAIL, text)
