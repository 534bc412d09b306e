"""Changing the backing file name that an image stores, in place and safe against crashes.

At any moment the header must name the old base or the new one, in full.  A disk writes a
sector whole or not at all, so the sector with the header decides: everything that it
points to is durable before it is written.

A short name lies directly behind the header, in the same sector, and one write covers
both.  If the old name began there as well, its bytes past the new name are unused from
then on: the length in the same sector no longer covers them.

A long name crosses sectors.  It is written where neither the old name nor the header
lies, and made durable there while the header still points to the old name; then one write
of the header points to it.  Of three neighbouring slots, each as long as the longest
name, an old name can touch two at most.  The slots end where the descriptor of a free
list begins, so that both fit into the smallest cluster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.constants import HEADER_BYTES, MAX_BACKING_NAME, SECTOR, Feature

if TYPE_CHECKING:
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

MAX_SHORT_NAME_BYTES: Final = SECTOR - HEADER_BYTES
"""Longest name that fits into one sector with the header, in bytes."""

LONG_NAME_OFFSETS: Final = (512, 1536, 2560)
"""File offsets of the slots for longer names, 1024 bytes apart: the longest has 1023."""

_NAME_FEATURES: Final = int(Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE)


async def change_backing_name(
    file: HostFile,
    header_store: HeaderStore,
    writeback: MetadataWriteback,
    flusher: Flusher,
    name: bytes,
    *,
    raw: bool,
) -> None:
    """Store another backing file name in the header, durably; an empty name is none.

    With ``raw`` the header forbids guessing the format of the base.

    Raises:
        HostError: The host refused.  The header names the old base or, if the host also
            refuses to restore it, the new one.
    """
    # What the image holds for use with its new base must be durable before the name is.
    await flusher.flush()
    old = header_store.value
    offset, trailer = (HEADER_BYTES, name) if name else (0, b"")
    if len(name) > MAX_SHORT_NAME_BYTES:
        offset, trailer = _unused_slot(old), b""
        await file.pwrite(offset, name)
        await writeback.barrier()
    wanted = int(Feature.BACKING_FILE) if name else 0
    if name and raw:
        wanted |= int(Feature.BACKING_FORMAT_NO_PROBE)

    def edit(header: Header) -> Header:
        return replace(
            header,
            features=header.features & ~_NAME_FEATURES | wanted,
            # A name must lie in the header's clusters; the image may come from a program
            # that counted none.
            header_size=max(1, header.header_size),
            backing_filename_offset=offset,
            backing_filename_size=len(name),
        )

    await header_store.change(edit, trailer=trailer, barrier=writeback.barrier)


def _unused_slot(header: Header) -> int:
    """Return the file offset of a slot for a long name that the present name does not touch."""
    if not header.has_backing:
        return LONG_NAME_OFFSETS[0]
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    return next(
        slot for slot in LONG_NAME_OFFSETS if end <= slot or slot + MAX_BACKING_NAME < start
    )
