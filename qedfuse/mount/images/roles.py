"""Finding the images of a mount that are backing files of other images in it.

Such an image must be opened read-only.  A write to a backing file would change the content of
its overlays.  Besides, the lock of a writable image excludes all other openers, and so its
overlays as well.  If a directory contains a golden image and its overlays, the user wants to
write to the overlays, so the golden image becomes read-only.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import chain_paths
from qedfuse.errors import ImageInUseError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.mount.images.naming import Source
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


def find_read_only(sources: Sequence[Source], options: MountOptions) -> set[Source]:
    """Return the sources that must be opened read-only, because others have them as backing files.

    Each is logged.  In a mount that writes to no source, the result is empty.

    Raises:
        ImageInUseError: The user named a source and its overlay for writing, or two sources
            are the same file.
    """
    if options.read_only or options.snapshot or options.overlay is not None:
        return set()  # the sources are opened read-only in any case
    if options.backing.mode == "none":
        return set()  # sources with a backing file are refused when they are opened
    files = _files(sources)
    overlays: dict[Source, list[Source]] = {}
    for source in sources:
        for path in chain_paths(source.path, options.backing.working_directory):
            base = files.get(_identity(path))
            if base is not None and base is not source:
                overlays.setdefault(base, []).append(source)
    for base, above in overlays.items():
        shown = printable(base.path)
        over = ", ".join(printable(overlay.path) for overlay in above)
        if base.is_named:
            msg = (
                f"{shown}: in use: found a backing file of {over}, which would be writable "
                "as well (name only the overlays, or mount all read-only with -r)"
            )
            raise ImageInUseError(msg)
        _log.warning("%s: read-only, because it is a backing file of %s", shown, over)
    return set(overlays)


def _files(sources: Sequence[Source]) -> dict[tuple[int, int] | None, Source]:
    """Return the sources that exist, by device and inode.

    Raises:
        ImageInUseError: Two sources are the same file.
    """
    files: dict[tuple[int, int] | None, Source] = {}
    for source in sources:
        identity = _identity(source.path)
        other = files.setdefault(identity, source)
        if identity is not None and other is not source:
            msg = (
                f"{printable(source.path)}: in use: found the same file as "
                f"{printable(other.path)} (name it once, or mount all read-only with -r)"
            )
            raise ImageInUseError(msg)
    files.pop(None, None)
    return files


def _identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a file; None if there is no file or no access to it."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
