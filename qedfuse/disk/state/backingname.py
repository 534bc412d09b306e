"""Changing the backing file name that an image stores, in place and safe against crashes.

At any moment the header must name the old base or the new one, in full.  The host's disk writes a
sector whole or not at all, so the name changes when the sector with the header is written.
Everything that the header points to in other sectors must be durable before that write.

A short name lies directly behind the header, in the same sector, so one write changes both.

A longer name does not fit into this sector.  First it is written where neither the old name nor the
header lies, and is made durable.  Then the header is written, which points to the new name.  There
are three adjacent slots for names, and each can hold the longest name.  An old name can touch at
most two slots, so one slot is always unused.  The last slot ends where the last sector of the first
4 KiB of the file begins, because this sector can hold the descriptor of a free list.
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
"""Maximum length in bytes of a name that fits into the sector of the header."""

LONG_NAME_OFFSETS: Final = (512, 1536, 2560)
"""File offsets of the slots for longer names.  A name has at most 1023 bytes, and a slot 1024."""

_NAME_FEATURES: Final = int(Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE)


async def change_backing_name(
    file: HostFile,
    header_store: HeaderStore,
    writeback: MetadataWriteback,
    flusher: Flusher,
    name: bytes,
    *,
    backing_is_raw: bool,
) -> None:
    """Store another backing file name in the image, durably; an empty name removes the base.

    The caller must have awaited `FirstWriteGuard.prepare_write`.  With ``backing_is_raw`` the
    header forbids probing the format of the base, if there is one.

    Raises:
        HostError: A system call failed.  If the header may have changed, the old header is written
            again.  The image may name the new base only if that second write fails as well, or if
            the power fails before the next datasync.
        ReadOnlyError: The disk has become read-only during the call.
    """
    # For a new base, a rebase has copied the clusters in which the bases differ into the image.
    # These copies must be durable before the header names the new base.
    await flusher.flush()
    old = header_store.value
    offset, trailer = (HEADER_BYTES, name) if name else (0, b"")
    if len(name) > MAX_SHORT_NAME_BYTES:
        offset, trailer = _unused_slot(old), b""
        await file.pwrite(offset, name)
        await writeback.barrier()
    wanted_features = int(Feature.BACKING_FILE) if name else 0
    if name and backing_is_raw:
        wanted_features |= int(Feature.BACKING_FORMAT_NO_PROBE)

    def edit(header: Header) -> Header:
        return replace(
            header,
            features=header.features & ~_NAME_FEATURES | wanted_features,
            # The name must lie in the clusters of the header, but some programs write 0 here.
            header_size=max(1, header.header_size),
            backing_filename_offset=offset,
            backing_filename_size=len(name),
        )

    await header_store.change(edit, trailer=trailer, barrier=writeback.barrier)


def _unused_slot(header: Header) -> int:
    """Return the file offset of the first slot that the present backing file name leaves unused."""
    if not header.has_backing:
        return LONG_NAME_OFFSETS[0]
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    return next(
        slot for slot in LONG_NAME_OFFSETS if end <= slot or slot + MAX_BACKING_NAME < start
    )
