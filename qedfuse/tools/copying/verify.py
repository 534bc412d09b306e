"""Reading a copy back, to find out whether it is the same as what it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.errors import HostError
from qedfuse.tools.copying.compare import compare

if TYPE_CHECKING:
    from qedfuse.tools.source.source import Source


async def verify(source: Source, copy: Source, name: str) -> None:
    """Compare all of a disk with a copy that is at least as long.

    Raises:
        HostError: They differ; the message says where they do first.
        QedError: One of them cannot be read.
    """
    found = await compare(source, copy)
    # What the copy has past the disk's end was there before.
    if found.offset is not None and found.offset < source.size:
        msg = f"{name}: content at {found.offset}: found other bytes than in {source.name}"
        raise HostError(msg)
