"""Images of a mount that are backing files of other images, and so must be read-only.

Writes to a backing file change the content of its overlays, and the locks of a writable
backing file and of its overlays exclude each other.  In a directory with a golden image and
overlays of it, the user wants to write to the overlays.
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
    """Return the sources that must be opened read-only as backing files of other sources.

    Raises:
        ImageInUseError: In a writable mount, the user named one of them itself, or two sources
            are the same file.
    """
    if options.read_only or options.snapshot or options.overlay is not None:
        return set()  # only images that the mount itself makes are opened for writing
    if options.backing.mode == "none":
        return set()  # images with a backing file are refused
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
    """Return the sources by device and inode.

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
    """Return the device and inode of a file; None if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
