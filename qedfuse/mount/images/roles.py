"""Which of the images of a mount are bases of others, and so can only be read.

An image that is written to under an overlay changes what the overlay shows, and two
writers lock each other out.  In a directory with a golden image and its overlays the
overlays are what the user wants to write to.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.chainpaths import chain_paths
from qedfuse.errors import ImageInUseError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.mount.images.naming import Source
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


def find_read_only(sources: Sequence[Source], options: MountOptions) -> set[Source]:
    """Return the sources to be opened read-only because others have them as a base.

    Raises:
        ImageInUseError: One that the user named is among them, or two sources are one
            file, in a mount that can be written to.
    """
    if options.read_only or options.snapshot or options.overlay is not None:
        return set()  # nothing is opened for writing but what the mount itself makes
    if options.backing.mode == "none":
        return set()  # an image that has a base is refused
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
                f"{shown}: in use: found a backing file of {over}, which is to be written to "
                "as well (name only the overlays, or mount all read-only with -r)"
            )
            raise ImageInUseError(msg)
        _log.warning("%s: read-only, because it is a backing file of %s", shown, over)
    return set(overlays)


def _files(sources: Sequence[Source]) -> dict[tuple[int, int] | None, Source]:
    """Return the sources by the files that they are.

    Raises:
        ImageInUseError: Two are one file.
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
    """Tell two names of one file; None for what is missing."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
