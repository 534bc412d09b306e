"""Resolving the name of a backing file to a path; names outside the directory are not looked up.

A plain name is relative to the image's directory.  A path after ``file:`` is relative to the
working directory, as in QEMU.

The name is untrusted.  Even a test whether the file exists can have effects: an automounter may
mount a file system, or the test may hang on a network server.  So the name is looked up only if it
leads into the image's directory.  A symbolic link in that directory is followed even if the link
leads out, because an image cannot create links: only a user who may write to the directory can.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from qedfuse.disk.lookup.backingpath import backing_path, has_protocol


@dataclass(frozen=True, slots=True)
class BackingName:
    """A backing file as an image names it.

    Attributes:
        name: The name, as stored.
        path: The path that QEMU composes: the directory in the path of the image, followed by
            the name.  For an absolute name, and for a name with a protocol, ``file:`` or a NUL
            byte, the name itself.
        resolved: Absolute path of the backing file, without ``.`` and ``..``.  Symbolic links
            are followed only if the name leads into the image's directory and does not lead
            out again.  The name itself if it has a protocol or a NUL byte, or if it begins with
            ``file:`` and the working directory has been removed.
        is_raw: Whether the image states that the backing file is raw.
        absolute: Whether the name, without ``file:``, is an absolute path.
        scheme: The protocol before a colon, as in ``nbd:`` or ``json:``; None for a path,
            with or without ``file:`` before it.
        escapes: Whether the name may lead out of the image's directory; True for a name that
            cannot be resolved.
    """

    name: str
    path: str
    resolved: str
    is_raw: bool
    absolute: bool
    scheme: str | None
    escapes: bool


def resolve_name(stored: bytes, image: str, *, raw_format: bool) -> BackingName:
    """Resolve a backing file name from the header of ``image``.

    Args:
        stored: The bytes of the name, as stored.
        image: Path of the image.
        raw_format: Whether the image states that the backing file is raw.
    """
    name = os.fsdecode(stored)
    scheme = name.partition(":")[0] if has_protocol(stored) else None
    absolute = name.removeprefix("file:").startswith("/")
    if scheme is not None or "\0" in name:
        return BackingName(name, name, name, raw_format, absolute, scheme, escapes=True)
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


def _resolve(name: str, directory: str) -> tuple[str, bool]:
    """Resolve a name to an absolute path.

    If the name leads into ``directory``, and its further components do not lead out again,
    symbolic links are followed.  If not, the path is only normalized, without I/O.

    Args:
        name: The name, a path that may be absolute.
        directory: Absolute path without symbolic links, to which a relative name refers.

    Returns:
        The absolute path, and whether the name may lead out of ``directory``; True if the
        path was only normalized, or if a symbolic link leads out.
    """
    reached = "/" if name.startswith("/") else directory
    components = [component for component in name.split("/") if component not in ("", ".")]
    normalized = os.path.normpath(os.path.join(reached, *components))  # noqa: PTH118  no I/O
    for number, component in enumerate(components):
        # normpath is correct here, because `reached` has no symbolic links: `reached` is
        # `directory` itself or a directory above it.
        following = os.path.normpath(os.path.join(reached, component))  # noqa: PTH118
        if _inside(following, directory):
            if _climbs(components[number:]):
                break
            real = os.path.realpath(os.path.join(reached, *components[number:]))  # noqa: PTH118
            return real, not _inside(real, directory)
        if following != directory and not _inside(directory, following):
            break
        reached = following
    return normalized, True


def _climbs(components: list[str]) -> bool:
    """Return whether a relative path leaves its starting directory, even if it returns later."""
    depth = 0
    for component in components:
        depth += -1 if component == ".." else 1
        if depth < 0:
            return True
    return False


def _inside(path: str, directory: str) -> bool:
    """Return whether an absolute path lies inside a directory; False for the directory itself."""
    return path.startswith(directory.rstrip("/") + "/")
