"""Opening a disk that a tool will change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.disk import Disk


def open_writable(
    path: str, options: OpenOptions | None = None, *, with_bases: bool = True
) -> AbstractAsyncContextManager[Disk]:
    """Open an image for writing, for an ``async with`` block; check it first if it needs that.

    Args:
        path: The image.
        options: How to open it; ``writable`` is set in any case.
        with_bases: As for `open_disk`.

    Raises:
        CorruptImageError: The check found damage.
        QedError: The image or a base cannot be opened or locked, or is not trusted.
    """
    options = replace(options or OpenOptions(), writable=True)
    return open_disk(path, options, inspector=inspect_image, with_bases=with_bases)
