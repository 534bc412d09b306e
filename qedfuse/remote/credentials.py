"""Credentials for servers, in a file that only its owner may read.

The file has lines ``NAME=VALUE``, without continued lines and escapes.  No message of this module
contains any content of the file, not even the name of a variable.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final

from qedfuse.errors import HostError, UsageError
from qedfuse.hostio.regular import open_regular
from qedfuse.text import printable

_MAX_BYTES: Final = 64 << 10
"""Maximum length of the file."""
_LINE: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_QUOTES: Final = ('"', "'")


def read_credentials(path: str) -> tuple[tuple[str, str], ...]:
    """Return the variables in a file, each as name and value, in the order of their lines.

    Empty lines and lines that begin with ``#`` are skipped.  Quotes around a value are removed.

    Raises:
        HostError: The file cannot be read.
        ImageError: The file is not a regular file.
        UsageError: The group or others have access to the file, the file is too long, or a line
            is not valid.
    """
    shown = printable(path)
    fd = open_regular(path, os.O_RDONLY)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o077:
            msg = (
                f"{shown}: credentials: found permissions {mode:04o}, expected none for the group "
                "and for others (chmod 600)"
            )
            raise UsageError(msg)
        raw = os.pread(fd, _MAX_BYTES + 1, 0)
    except OSError as error:
        raise HostError.from_os(error, shown, "cannot read") from error
    finally:
        os.close(fd)
    if len(raw) > _MAX_BYTES:
        msg = f"{shown}: credentials: found more than {_MAX_BYTES} bytes, expected no more"
        raise UsageError(msg)
    variables = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        variable = _parse_line(line)
        if variable is None:
            msg = f"{shown}: credentials: line {number}: found another form, expected NAME=VALUE"
            raise UsageError(msg)
        if variable:
            variables.append(variable)
    return tuple(variables)


def _parse_line(line: bytes) -> tuple[str, str] | tuple[()] | None:
    """Return the name and the value in a line; () for a line to skip, None for an invalid line."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return None
    if not text or text.startswith("#"):
        return ()
    match = _LINE.fullmatch(text)
    if match is None or not text.isprintable():
        return None
    name, value = match[1], match[2].strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES:
        value = value[1:-1]
    return name, value
