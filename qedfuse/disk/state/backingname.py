"""Changing the backing file name that an image stores, in place and safe against crashes.

At any moment the header must name the old base or the new one, in full.  The host's disk writes a
sector whole or not at all, so the name changes when the sector with the header is written.
Everything that the header points to in other sectors must be durable before that write.

A short name lies directly behind the header, in the same sector, so one write changes both.

A longer name does not fit into this sector.  First it is written where neither the old name nor the
header lies, and is made durable.  Then the header is written, which points to the new name.  The
new name takes whole sectors of the header's clusters.  The last sector of the first 4 KiB of the
file is not used, because it can hold the descriptor of a free list.

This leaves six sectors of a header of 4 KiB.  A name that this program stores takes at most two of
them, wherever the old name lies, if that has at most `MAX_STORED_NAME` bytes.  Other programs store
longer names.  Beside such a name there may be no space in a header of 4 KiB; then the new name is
refused.  A header of 8 KiB or more always has space.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import HEADER_BYTES, SECTOR, Feature
from qedfuse.ondisk.freelist import DESCRIPTOR_END, DESCRIPTOR_OFFSET

if TYPE_CHECKING:
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

MAX_SHORT_NAME_BYTES: Final = SECTOR - HEADER_BYTES
"""Maximum length in bytes of a name that fits into the sector of the header."""

_NAME_FEATURES: Final = int(Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE)


def new_name_offset(header: Header, length: int, name: str) -> int:
    """Return the file offset at which a new backing file name can be written.

    A name of more than `MAX_SHORT_NAME_BYTES` gets whole sectors that hold neither the header, nor
    the present name, nor the descriptor of a free list.

    Args:
        header: The present header.
        length: Length of the new name in bytes.
        name: Name of the image in messages.

    Raises:
        UsageError: The present name leaves no space for the new name.
    """
    if length <= MAX_SHORT_NAME_BYTES:
        return HEADER_BYTES
    size = -(-length // SECTOR) * SECTOR
    used = [(DESCRIPTOR_OFFSET, DESCRIPTOR_END)]
    start = header.backing_filename_offset
    end = start + header.backing_filename_size
    if header.has_backing:
        used.append((start, end))
    for offset in range(SECTOR, header.header_end - size + 1, SECTOR):
        if all(offset + size <= first or past <= offset for first, past in used):
            return offset
    msg = (
        f"{name}: backing file name: found the present name in bytes {start} to {end - 1} of the "
        f"header's {header.header_end} bytes, which leaves no space for a new name of {length} "
        f"bytes, expected a new name of at most {MAX_SHORT_NAME_BYTES} bytes"
    )
    raise UsageError(msg)


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
        UsageError: `new_name_offset` finds no space for the name; nothing is written then.
        HostError: A system call failed.  If the header may have changed, the old header is written
            again.  The image may name the new base only if that second write fails as well, or if
            the power fails before the next datasync.
        ReadOnlyError: The disk has become read-only during the call.
    """
    offset = new_name_offset(header_store.value, len(name), file.name)
    # For a new base, a rebase has copied the clusters in which the bases differ into the image.
    # These copies must be durable before the header names the new base.
    await flusher.flush()
    trailer = name
    if len(name) > MAX_SHORT_NAME_BYTES:
        trailer = b""
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
            backing_filename_offset=offset if name else 0,
            backing_filename_size=len(name),
        )

    await header_store.change(edit, trailer=trailer, barrier=writeback.barrier)
