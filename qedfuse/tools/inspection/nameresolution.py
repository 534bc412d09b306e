"""Resolving the name of a backing file to a path, looking up only files in the image's directory.

The name is untrusted.  Even a test whether the file exists can have effects: an automounter may
mount a file system, or the test may hang on a network server.  So a name is looked up only as far
as it leads into the image's directory.  Symbolic links in that directory are untrusted as well,
because they may come from the same archive as the image.  A link that leads out is read, but not
followed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from qedfuse.disk.lookup.backingpath import backing_path, has_protocol
from qedfuse.errors import UsageError
from qedfuse.remote.address import is_url, parse_address

_MAX_LINKS: Final = 40
"""Maximum number of symbolic links in the resolution of a name, as in the Linux kernel."""


@dataclass(frozen=True, slots=True)
class BackingName:
    """A backing file as an image names it.

    Attributes:
        name: The name, as stored.
        path: The path or URL that QEMU composes: the directory in the path of the image, followed
            by the name.  The name itself if it is absolute, or has a protocol, ``file:`` or a NUL
            byte.
        resolved: Absolute path of the backing file without ``.`` and ``..``; if ``escapes`` is
            False, also without symbolic links.  The name itself if it cannot be resolved; ``path``
            if the image is a URL.
        is_raw: Whether the image states that the backing file is raw.
        absolute: Whether the name, without ``file:``, is an absolute path.
        scheme: The protocol before a colon, as in ``nbd:`` or ``json:``; None for a path.
        escapes: Whether the name may lead out of the image's directory, or cannot be resolved.
        is_local: Whether the image is a URL and the name is the path of a local file.
    """

    name: str
    path: str
    resolved: str
    is_raw: bool
    absolute: bool
    scheme: str | None
    escapes: bool
    is_local: bool = False


def resolve_name(stored: bytes, image: str, *, raw_format: bool) -> BackingName:
    """Resolve a backing file name from the header of ``image``.

    Args:
        stored: The bytes of the name, as stored.
        image: Path or URL of the image.
        raw_format: Whether the image states that the backing file is raw.
    """
    name = os.fsdecode(stored)
    scheme = name.partition(":")[0] if has_protocol(stored) else None
    absolute = name.removeprefix("file:").startswith("/")
    if scheme is not None or "\0" in name:
        return BackingName(name, name, name, raw_format, absolute, scheme, escapes=True)
    if is_url(image):
        return _resolve_in_url(name, image, raw_format=raw_format, absolute=absolute)
    image_directory = image[: image.rfind("/") + 1]
    path = location = name
    if name.startswith("file:"):
        try:
            location = os.path.join(os.getcwd(), backing_path(image, name))  # noqa: PTH109, PTH118
        except OSError:  # the working directory has been removed
            return BackingName(name, name, name, raw_format, absolute, scheme, escapes=True)
    elif not absolute:
        path = image_directory + name
    directory = os.path.realpath(image_directory or ".")
    resolved, escapes = _resolve(location, directory)
    return BackingName(name, path, resolved, raw_format, absolute, scheme, escapes)


def _resolve_in_url(name: str, image: str, *, raw_format: bool, absolute: bool) -> BackingName:
    """Resolve a name without a protocol in an image that is a URL, without any I/O."""
    path = backing_path(image, name)
    if not is_url(path):
        return BackingName(
            name, name, name, raw_format, absolute, None, escapes=True, is_local=True
        )
    try:
        parse_address(path)
    except UsageError:  # for example a name with ".."
        return BackingName(name, path, path, raw_format, absolute, None, escapes=True)
    return BackingName(name, path, path, raw_format, absolute, None, escapes=False)


def _resolve(name: str, directory: str) -> tuple[str, bool]:
    """Resolve a name to an absolute path, and look up nothing outside of ``directory``.

    A component that leads into ``directory`` is looked up, and followed if it is a symbolic link.
    A component that leads to ``directory`` itself, or to a directory above it, needs no lookup.
    The first component that leads elsewhere, and all after it, are only normalized.  A link after
    `_MAX_LINKS` links counts as a component that leads elsewhere.

    Returns the path, and whether it leads out of ``directory`` or may do so.  ``directory`` must be
    absolute and free of symbolic links.
    """
    reached = "/" if name.startswith("/") else directory
    left = name.split("/")[::-1]  # a stack: the last item is the next component to follow
    links = 0
    while left:
        # normpath is correct here, because `reached` has no symbolic links.
        following = os.path.normpath(os.path.join(reached, left.pop()))  # noqa: PTH118  no I/O
        inside = _inside(following, directory)
        target = _link_target(following) if inside else None
        if target is not None and links < _MAX_LINKS:
            links += 1
            left += target.split("/")[::-1]
            reached = "/" if target.startswith("/") else os.path.dirname(following)  # noqa: PTH120
            continue
        above = following == directory or _inside(directory, following)
        if target is not None or not (inside or above):
            rest = os.path.join(following, *left[::-1])  # noqa: PTH118  no I/O
            return os.path.normpath(rest), True
        reached = following
    return reached, not _inside(reached, directory)


def _link_target(path: str) -> str | None:
    """Return what a symbolic link contains; None if the path is not a link or cannot be read."""
    try:
        return os.readlink(path)  # noqa: PTH115  a name, not a Path
    except OSError:
        return None


def _inside(path: str, directory: str) -> bool:
    """Return whether an absolute path lies inside a directory.

    False for the directory itself, unless it is the root directory.
    """
    return path.startswith(directory.rstrip("/") + "/")
