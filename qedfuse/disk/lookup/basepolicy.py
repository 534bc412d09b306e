"""The policy for backing files on this machine: which names and which files an image may use."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

from qedfuse.disk.lookup.backingpath import has_protocol
from qedfuse.errors import BackingError, BackingRefusedError, HostError, ImageError
from qedfuse.hostio.opendirectory import OpenDirectory, kernel_path, real_directory
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.remote.address import is_url, parse_address, shown_name
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.disk.options import BackingPolicy
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.remote.address import Address

_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of open(2) that do not depend on the path."""


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
    try:
        base = PosixFile.open(path)
    except (HostError, ImageError) as error:
        msg = f"{image.name}: backing file {error}"
        raise BackingError(msg) from error
    try:
        if policy.mode != "any":
            _confine(base, image, policy, trusted)
    except OSError as error:
        base.close()
        reason = os.strerror(error.errno or 0)
        msg = f"{image.name}: backing file {base.name}: cannot find its directory: {reason}"
        raise BackingError(msg) from error
    except BaseException:
        base.close()
        raise
    return base


def _confine(base: PosixFile, image: HostFile, policy: BackingPolicy, trusted: str | None) -> None:
    """Refuse a base that lies outside of all allowed directories; see `open_local_base`.

    The files that an image names may lie in the image's ``directory``, and those that its base
    names in that of the base.  A directory was opened with its file, so it stays the same if a
    program puts a link or another directory in its place.

    If the last name in the path of the base is a symbolic link, ``directory`` is that of the link,
    because relative names are looked up there (`backing_path`, as in QEMU).  But a hostile image
    can name any link, also one that another user has made.  So if the directory of the link is not
    allowed for the base itself, the directory of the file replaces it.  A trusted base for which
    that directory cannot be found gets none, so only the files that it names are refused.

    Raises:
        BackingRefusedError: The base lies outside.
        OSError: A system call failed.
    """
    link = _directory_of(base)
    is_trusted = is_named(base.path, base, trusted)
    paths = [*policy.directories]
    if is_trusted and trusted is not None:
        paths.append(os.path.dirname(trusted) or ".")  # noqa: PTH120  no Path is wanted
    is_link_allowed = _is_allowed(link, image, paths)
    if is_trusted and is_link_allowed:
        return
    try:
        name = os.path.basename(base.path)  # noqa: PTH119  no Path is wanted
        real = real_directory(base.fd, name, link)
    except OSError:
        if not is_trusted:
            raise
        base.close_directory()
        return
    try:
        if not is_trusted and not _is_allowed(real, image, paths):
            raise _refusal(base, image)
        if not is_link_allowed:
            base.directory, real = real, link
    finally:
        if real is not base.directory:
            real.close()


def _is_allowed(directory: OpenDirectory, image: HostFile, paths: Sequence[str]) -> bool:
    """Return whether a directory is that of an image, one at ``paths``, or below one of these.

    A path is examined only if no directory before it decides.  A path that leads to no usable
    directory is ignored: it can be that of a file system whose server is gone.

    Raises:
        BackingRefusedError: No directory was opened with the image.
        OSError: No descriptor is free, or another system call failed.
    """
    if _directory_of(image).holds(directory):
        return True
    for path in paths:
        allowed = _usable_directory(path)
        if allowed is not None:
            with closing(allowed):
                if allowed.holds(directory):
                    return True
    return False


def _usable_directory(path: str) -> OpenDirectory | None:
    """Return the directory at a path, which the caller must close; None if it cannot be used.

    Raises:
        OSError: No descriptor or no memory is free.
    """
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(closing(OpenDirectory(path)))
            # A directory of a server that is gone can be opened, and fails here.
            os.fstat(directory.fd)
            stack.pop_all()
    except OSError as error:
        if error.errno in _NO_RESOURCES:
            raise
        return None
    return directory


def _directory_of(file: HostFile) -> OpenDirectory:
    """Return the directory that was opened with a local file.

    Raises:
        BackingRefusedError: The file has no such directory, or it was closed too early.
    """
    found = file.directory if isinstance(file, PosixFile) else None
    if found is None:
        msg = (
            f"{file.name}: backing file: refused: found no directory of this image, expected one "
            "that confines its backing file (backing=any allows any file)"
        )
        raise BackingRefusedError(msg)
    return found


def _refusal(base: PosixFile, image: HostFile) -> BackingRefusedError:
    """Return the error for a base that lies outside of all allowed directories.

    Raises:
        OSError: A system call failed.
    """
    real, expected = kernel_path(base.fd), _directory_of(image).path
    msg = (
        f"{image.name}: backing file {base.name}: refused: found {printable(real)}, expected a "
        f"file inside {printable(expected)} (allow it with backing_dir="
        f"{printable(os.path.dirname(real))} or backing=any)"  # noqa: PTH120
    )
    return BackingRefusedError(msg)


def close_directory(file: HostFile) -> None:
    """Close the directory of a local file, once the files that it names are open."""
    if isinstance(file, PosixFile):
        file.close_directory()


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
