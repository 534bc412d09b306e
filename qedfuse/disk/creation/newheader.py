"""The header of a new image, from sizes and a backing name that the user has chosen."""

from __future__ import annotations

import os

from qedfuse.disk.lookup.backingpath import has_protocol, lacks_path
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import (
    HEADER_BYTES,
    MAX_STORED_NAME,
    SECTOR,
    Feature,
)
from qedfuse.ondisk.geometry import expected_size
from qedfuse.ondisk.header import Header
from qedfuse.remote.address import is_url, parse_address
from qedfuse.text import printable


def backing_name(backing: str | None) -> bytes:
    """Return the bytes of a backing name as an image stores them; empty for None or "".

    Raises:
        UsageError: The name is too long, contains a NUL byte, or is ``file:`` without a path.  Or
            it begins with a protocol other than ``file:``, and is not a valid URL.
    """
    name = os.fsencode(backing or "")
    if backing and is_url(backing):
        shown = parse_address(backing).shown
        if len(name) > MAX_STORED_NAME:
            msg = f"backing file {shown}: expected a URL of at most {MAX_STORED_NAME} bytes"
            raise UsageError(msg)
        return name
    if lacks_path(name):
        msg = f"backing file {printable(name)}: found no path after file:, expected a path"
        raise UsageError(msg)
    if len(name) > MAX_STORED_NAME or has_protocol(name) or b"\0" in name:
        msg = (
            f"backing file {printable(name)}: expected a plain path of at most "
            f"{MAX_STORED_NAME} bytes (a file whose name has a colon is written ./NAME)"
        )
        raise UsageError(msg)
    return name


def new_header(
    size: int, cluster_size: int, table_size: int, backing: str | None, *, backing_is_raw: bool
) -> Header:
    """Build the header of an empty image, after validating the arguments.

    Args:
        size: Size of the disk in bytes; is rounded up to whole sectors.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: Name of the backing file; None or empty for no backing file.
        backing_is_raw: Whether the header forbids programs to probe the format of the backing file.

    Raises:
        UsageError: A size is not allowed, or `backing_name` refuses the name.
    """
    for field, value in (("cluster_size", cluster_size), ("table_size", table_size)):
        expected = expected_size(field, value)
        if expected is not None:
            msg = f"{field.replace('_', ' ')}: found {value}, expected {expected}"
            raise UsageError(msg)
    name = backing_name(backing)
    features = 0
    if name:
        features = int(Feature.BACKING_FILE)
        if backing_is_raw:
            features |= int(Feature.BACKING_FORMAT_NO_PROBE)
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=features,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=cluster_size,
        image_size=-(-size // SECTOR) * SECTOR,
        backing_filename_offset=HEADER_BYTES if name else 0,
        backing_filename_size=len(name),
    )
    max_size = header.geometry.max_image_size
    if not 0 <= header.image_size <= max_size:
        msg = (
            f"image size: found {size}, expected 0 to {max_size} with clusters of {cluster_size} "
            f"bytes and tables of {table_size} clusters"
        )
        raise UsageError(msg)
    return header
