r"""The syntax of ``-o``: options between commas, each ``name`` or ``name=value``.

As in libfuse, a comma in a value is written ``\,`` and a backslash ``\\``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PATH_OPTIONS: Final[Mapping[str, Literal["file", "directory"]]] = {
    "overlay": "file",
    "credentials": "file",
    "backing_dir": "directory",
    "cache_dir": "directory",
}
"""Options whose value is a path, each with the kind of file to which the path leads."""
_UNIX_OPTION: Final = "metrics=unix:"
"""The beginning of an option that names a Unix socket; a path follows."""


def split_options(text: str) -> list[str]:
    r"""Split a list at its commas, but not at ``\,``; return the options without escapes.

    Empty options are dropped.
    """
    options = [""]
    escaped = False
    for char in text:
        if escaped:
            # Before any other character a backslash stands for itself, as in a path that was not
            # escaped.
            options[-1] += char if char in ",\\" else "\\" + char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == ",":
            options.append("")
        else:
            options[-1] += char
    if escaped:
        options[-1] += "\\"
    return [option for option in options if option]


def absolute_options(lists: Iterable[str]) -> tuple[str, ...]:
    """Split lists of options, make the paths in them absolute, and return the escaped options.

    Raises:
        FileNotFoundError: A path is relative, and the working directory has been removed.
    """
    absolute = []
    for option in (option for text in lists for option in split_options(text)):
        name, _, value = option.partition("=")
        path = option.removeprefix(_UNIX_OPTION)
        if name in PATH_OPTIONS and value:
            option = f"{name}={Path(value).absolute()}"  # noqa: PLW2901
        elif path != option and path:
            option = f"{_UNIX_OPTION}{Path(path).absolute()}"  # noqa: PLW2901
        absolute.append(escape_value(option))
    return tuple(absolute)


def wants_remount(lists: Iterable[str]) -> bool:
    """Return whether lists of options contain ``remount``."""
    return any("remount" in split_options(text) for text in lists)


def escape_value(text: str) -> str:
    """Escape commas and backslashes for `split_options` and for libfuse."""
    return text.replace("\\", "\\\\").replace(",", "\\,")
