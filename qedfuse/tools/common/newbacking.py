"""Refusing an image that would be its own base, be it by way of others."""

from __future__ import annotations

import os

from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.chainpaths import chain_paths
from qedfuse.errors import BackingError
from qedfuse.text import printable


def refuse_backing_loop(image: str, backing: str, directory: str = "") -> None:
    """Look for a file that is about to be replaced among the bases it is to have.

    Only names are followed, as far as they lead to files: whether the bases are any good
    is not asked here.

    Args:
        image: The file; it need not be there.
        backing: Its base, by a name that is absolute or begins at the image's directory.
        directory: Where names after ``file:`` begin; empty is the working directory.

    Raises:
        BackingError: It is among them.
    """
    about = f"{printable(image)}: backing file"
    path = backing_path(image, backing, directory)
    if _same(path, image):
        msg = f"{about} {printable(path)}: found the image itself"
        raise BackingError(msg)
    for below in chain_paths(path, directory):
        if _same(below, image):
            msg = (
                f"{about} {printable(below)}: found the image itself by way of {printable(backing)}"
            )
            raise BackingError(msg)


def _same(first: str, second: str) -> bool:
    """Tell whether two names lead to one file, which need not be there yet."""
    return os.path.realpath(first) == os.path.realpath(second) or (
        os.path.exists(first)  # noqa: PTH110
        and os.path.exists(second)  # noqa: PTH110
        and os.path.samefile(first, second)  # noqa: PTH121
    )
