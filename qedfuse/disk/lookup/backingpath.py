"""What the name of a backing file means as a path."""

from __future__ import annotations

import os
from typing import Final

_FILE: Final = "file:"
"""QEMU's protocol for files: what follows is a path, with colons or without."""


def has_protocol(name: bytes) -> bool:
    """Return whether QEMU would take a name for something else than a file."""
    return b":" in name.split(b"/", 1)[0] and not name.startswith(os.fsencode(_FILE))


def lacks_path(name: bytes) -> bool:
    """Return whether a name is the protocol for files and nothing else."""
    return name == os.fsencode(_FILE)


def backing_path(image: str, name: str, directory: str = "") -> str:
    """Return the path of the backing file that an image calls ``name``, without any I/O.

    A plain name begins at the directory of the image.  After ``file:`` it begins at the
    working directory, as in QEMU.

    Args:
        image: The path of the image.
        name: The name as it is stored; it has no other protocol.
        directory: The working directory; empty for that of the process.
    """
    if name.startswith(_FILE):
        return os.path.join(directory, name.removeprefix(_FILE))  # noqa: PTH118  no I/O
    return os.path.join(os.path.dirname(image), name)  # noqa: PTH118, PTH120  no I/O
