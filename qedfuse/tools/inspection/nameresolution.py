"""Where the name of a backing file leads, told without going there.

The name is a stranger's.  Even to look whether such a file exists can have effects (an
automounter, a server that hangs), so links are only followed inside the image's directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from qedfuse.disk.lookup.backingpath import backing_path, has_protocol


@dataclass(frozen=True, slots=True)
class BackingName:
    """A backing file as an image names it.

    Attributes:
        name: As it is stored.
        path: Where it leads, seen from where the program runs, as QEMU makes it up: the
            directory of the image, as it was named, and the name; with a protocol the name.
        resolved: The same as an absolute path, without dots; without links too, if it is
            inside the image's directory.
        is_raw: Whether the image says that it is raw.
        absolute: Whether it is an absolute path.
        scheme: What stands before a colon, as in ``nbd:`` or ``json:``; None in a path, be it
            a plain one or one after ``file:``.
        escapes: Whether it leads out of the image's directory.
    """

    name: str
    path: str
    resolved: str
    is_raw: bool
    absolute: bool
    scheme: str | None
    escapes: bool


def resolve_name(raw: bytes, image: str, *, raw_format: bool) -> BackingName:
    """Judge the name that the header of ``image`` has."""
    name = os.fsdecode(raw)
    scheme = name.partition(":")[0] if has_protocol(raw) else None
    absolute = name.removeprefix("file:").startswith("/")
    if scheme is not None or "\0" in name:
        return BackingName(name, name, name, raw_format, absolute, scheme, escapes=True)
    beside = image[: image.rfind("/") + 1]
    path = place = name
    if name.startswith("file:"):
        try:
            place = os.path.join(os.getcwd(), backing_path(image, name))  # noqa: PTH109, PTH118
        except OSError:  # the working directory has been removed
            return BackingName(name, name, name, raw_format, absolute, scheme, escapes=True)
    elif not absolute:
        path = beside + name
    directory = os.path.realpath(beside or ".")
    resolved, escapes = _resolve(place, directory)
    return BackingName(name, path, resolved, raw_format, absolute, scheme, escapes)


def _resolve(name: str, directory: str) -> tuple[str, bool]:
    """Follow a name from a directory that has no links in its path; tell whether it leaves it."""
    place = "/" if name.startswith("/") else directory
    parts = [part for part in name.split("/") if part not in ("", ".")]
    plain = os.path.normpath(os.path.join(place, *parts))  # noqa: PTH118  no I/O
    for number, part in enumerate(parts):
        # All of the path so far leads down to the directory, so there is no link in it.
        following = os.path.normpath(os.path.join(place, part))  # noqa: PTH118
        if _inside(following, directory):
            if _climbs(parts[number:]):
                break
            real = os.path.realpath(os.path.join(place, *parts[number:]))  # noqa: PTH118
            return real, not _inside(real, directory)
        if following != directory and not _inside(directory, following):
            break
        place = following
    return plain, True


def _climbs(parts: list[str]) -> bool:
    """Tell whether a path leaves the place where it begins, even if it comes back."""
    depth = 0
    for part in parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")
