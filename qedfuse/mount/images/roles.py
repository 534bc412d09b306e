"""Finding the images of a mount that are backing files of other images in the same mount.

A write to such a backing file would change the content of its overlays.  Besides, opening an
overlay fails while its backing file is locked for writing.

A user who names a directory with a backing file and its overlays wants to write to the overlays.
So the backing file becomes read-only.  If the user has named the backing file itself, the intention
is unknown, so a writable mount is refused.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import chain_paths
from qedfuse.errors import ImageInUseError, UsageError
from qedfuse.hostio.regular import identity_of
from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.hostio.hostfile import FileIdentity
    from qedfuse.mount.images.naming import Source
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


def find_read_only(sources: Sequence[Source], options: MountOptions) -> set[Source]:
    """Return the sources that must be opened read-only: the backing files of other sources.

    Each source in the result is logged.  The result is empty if the mount writes to no source.  It
    is also empty with ``backing=none``: sources that have a backing file are refused later.

    Raises:
        ImageInUseError: A backing file in the chain of a source is itself a source that the user
            named, or two sources are the same file.
        UsageError: A source is a URL, and the mount would write to it.
    """
    if options.read_only or options.snapshot or options.overlay is not None:
        return set()
    for source in sources:
        if is_url(source.path):
            msg = (
                f"{source.shown}: found a URL in a mount that can be written to, expected -r, "
                "-o snapshot or -o overlay=FILE"
            )
            raise UsageError(msg)
    if options.backing.mode == "none":
        return set()
    by_identity = _by_identity(sources)
    overlays: dict[Source, list[Source]] = {}
    for source in sources:
        for path in chain_paths(source.path, options.backing.working_directory):
            base = by_identity.get(_identity(path))
            if base is not None and base is not source:
                overlays.setdefault(base, []).append(source)
    for base, overlays_of_base in overlays.items():
        shown = printable(base.path)
        shown_overlays = ", ".join(printable(overlay.path) for overlay in overlays_of_base)
        if base.is_named:
            msg = (
                f"{shown}: in use: it is a backing file of {shown_overlays}, and all would be "
                "writable (name only the overlays, or mount all read-only with -r)"
            )
            raise ImageInUseError(msg)
        _log.warning("%s: read-only, because it is a backing file of %s", shown, shown_overlays)
    return set(overlays)


def _by_identity(sources: Sequence[Source]) -> dict[FileIdentity | None, Source]:
    """Return the sources by device and inode, without those that are missing or inaccessible."""
    by_identity: dict[FileIdentity | None, Source] = {}
    for source in sources:
        identity = _identity(source.path)
        other = by_identity.setdefault(identity, source)
        if identity is not None and other is not source:
            msg = (
                f"{printable(source.path)}: in use: found the same file as "
                f"{printable(other.path)} (name the file once, or mount all read-only with -r)"
            )
            raise ImageInUseError(msg)
    by_identity.pop(None, None)
    return by_identity


def _identity(path: str) -> FileIdentity | None:
    """Return the device and inode of a file; None if there is no file or no access to it."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return identity_of(found)
