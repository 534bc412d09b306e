"""The policy for backing files on this machine: which names and which files an image may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import has_protocol
from qedfuse.errors import BackingError, BackingRefusedError, HostError, ImageError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.remote.address import is_url, parse_address, shown_name
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.disk.options import BackingPolicy
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.remote.address import Address


def checked_name(raw: bytes, image: str) -> str:
    """Return the name that an image stores for its backing file, as a string.

    Args:
        raw: The name as bytes, as stored in the image.
        image: Name of the image in messages.

    Raises:
        BackingRefusedError: The name contains a NUL byte; or it begins with a protocol other than
            ``file:`` and is not a URL.
    """
    if b"\0" in raw:
        msg = f"{image}: backing file name: found a NUL byte in {shown_name(os.fsdecode(raw))}"
        raise BackingRefusedError(msg)
    if has_protocol(raw) and not is_url(os.fsdecode(raw)):
        msg = (
            f"{image}: backing file {printable(raw)}: found a protocol, expected a plain "
            "path (a file whose name has a colon is written ./NAME)"
        )
        raise BackingRefusedError(msg)
    return os.fsdecode(raw)


def open_local_base(
    path: str, image: HostFile, policy: BackingPolicy, trusted: str | None
) -> PosixFile:
    """Open a backing file that is a local file, if the policy allows it.

    The caller must already have refused the file if the mode of the policy is ``none``.

    Args:
        path: The path of the backing file.
        image: The image that names the backing file.
        policy: What is allowed.
        trusted: A path that is allowed in any directory; None if there is no such path.

    Raises:
        BackingError: The file is missing, is not a regular file, or cannot be opened.
        BackingRefusedError: The policy forbids the file.
    """
    shown = printable(path)
    try:
        base = PosixFile.open(path)
    except (HostError, ImageError) as error:
        msg = f"{image.name}: backing file {error}"
        raise BackingError(msg) from error
    if policy.mode == "any" or is_named(path, base, trusted):
        return base
    directory = os.path.dirname(image.path) or "."  # noqa: PTH120
    allowed = [os.path.realpath(path) for path in (directory, *policy.directories)]
    # The kernel's path of the open file contains no symbolic links.
    real = os.readlink(f"/proc/self/fd/{base.fd}")  # noqa: PTH115
    if any(real.startswith(parent.rstrip("/") + "/") for parent in allowed):
        return base
    base.close()
    msg = (
        f"{image.name}: backing file {shown}: refused: found {printable(real)}, expected a file "
        f"inside {printable(allowed[0])} (allow it with backing_dir="
        f"{printable(os.path.dirname(real))} or backing=any)"  # noqa: PTH120
    )
    raise BackingRefusedError(msg)


def is_named(path: str, base: HostFile, trusted: str | None) -> bool:
    """Return whether an open base is the one that the user has named.

    Args:
        path: The path or URL of the base.
        base: The open base.
        trusted: The path or URL that the user has named; None if the user has named no base.

    Raises:
        UsageError: One of the URLs is not valid.
    """
    if trusted is None:
        return False
    if is_url(path):
        return is_same_url(parse_address(path), trusted)
    return _is_same_file(base, trusted)


def is_same_url(address: Address, trusted: str | None) -> bool:
    """Return whether ``trusted``, which the user has named, is a URL with this address.

    Raises:
        UsageError: ``trusted`` is a URL that is not valid.
    """
    return trusted is not None and is_url(trusted) and parse_address(trusted) == address


def _is_same_file(file: HostFile, path: str) -> bool:
    """Return whether a path leads to the open file; False if either cannot be examined."""
    try:
        return os.path.samestat(file.stat(), os.stat(path))  # noqa: PTH116
    except (OSError, HostError):
        return False
