"""Changing the name of the base that an image stores, in place and safe against crashes.

At any moment the header must name the old base or the new one, whole.  A disk writes a
sector whole or not at all, so the sector with the header decides: everything that it
points to is durable before it is written.

A short name lies right behind the header, in the same sector, and one write brings both.
If the old name began there as well, what that write leaves of it further on belongs to
nobody: the length in the same sector no longer covers it.

A long name crosses sectors.  It is written to a place where neither the old name nor the
header lies, and is made durable there while the header still points to the old name;
then one write of the header points to it.  Of three places in a row, each as long as the
longest name, an old name can touch two at most.  They end where the descriptor of a list
of free clusters begins, so that this fits into the smallest cluster beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.constants import HEADER_BYTES, MAX_BACKING_NAME, SECTOR, Feature

if TYPE_CHECKING:
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

SHORT_NAME: Final = SECTOR - HEADER_BYTES
"""Longest name that lies in one sector with the header, in bytes."""

LONG_NAME_PLACES: Final = (512, 1536, 2560)
"""File offsets where a longer one may lie, 1024 bytes apart: the longest has 1023."""

_BITS: Final = int(Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE)


async def change_backing_name(
    file: HostFile,
    header_store: HeaderStore,
    writeback: MetadataWriteback,
    name: bytes,
    *,
    raw: bool,
) -> None:
    """Have the header name another base, durably; an empty name is none.

    ``raw`` forbids to guess the format of the base.

    Raises:
        HostError: The host refused; the header names the old base, or if it refuses to
            take that back as well, the new one.
    """
    # What the image shows over its new base must not be younger than the name.
    await writeback.flush()
    old = header_store.value
    place, trailer = (HEADER_BYTES, name) if name else (0, b"")
    if len(name) > SHORT_NAME:
        place, trailer = _free_offset(old), b""
        await file.pwrite(place, name)
        await writeback.barrier()
    wanted = int(Feature.BACKING_FILE) if name else 0
    if name and raw:
        wanted |= int(Feature.BACKING_FORMAT_NO_PROBE)

    def edit(header: Header) -> Header:
        return replace(
            header,
            features=header.features & ~_BITS | wanted,
            # A name must lie in the header's clusters; some writer may have counted none.
            header_size=max(1, header.header_size),
            backing_filename_offset=place,
            backing_filename_size=len(name),
        )

    await header_store.change(edit, trailer=trailer, barrier=writeback.barrier)


def _free_offset(header: Header) -> int:
    """Find a place for a long name that the present one does not touch."""
    if not header.has_backing:
        return LONG_NAME_PLACES[0]
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    return next(
        place for place in LONG_NAME_PLACES if end <= place or place + MAX_BACKING_NAME < start
    )
