"""Which files and addresses the server of a mount needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qedfuse.errors import CacheError
from qedfuse.remote.address import is_url, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qedfuse.mount.options import MountOptions
    from qedfuse.remote.address import Address


@dataclass(frozen=True)
class ServerNeeds:
    """The files and addresses that the process that serves a mount needs.

    Attributes:
        mountpoint: The mountpoint, absolute and free of symbolic links.
        is_directory: Whether the mountpoint is a directory.
        modes: The modes that the process may pass to chmod(2): those that the files of the disks
            can have, with and without write permission (`SizeFixup`).
        writable: Whether the mount can be written to.
        uses_servers: Whether a server, or a qemu-nbd process of the mount, serves an image or
            backing file.
        addresses: The addresses of the sources that are URLs, and the prefixes of the URLs that
            images may name as backing files.
        variables: The variables of the environment and of a file with credentials.
        key_files: The file with credentials, and the files with keys or tokens that the clients of
            object stores may read; all of them may be replaced during the mount.
        cache_directory: The directory of the cache for remote files; None for no cache.
        socket_directory: The descriptor of the directory of the socket for metrics; None for no
            socket.
    """

    mountpoint: str
    is_directory: bool
    modes: Sequence[int] = ()
    writable: bool = False
    uses_servers: bool = False
    addresses: Sequence[Address] = ()
    variables: Sequence[tuple[str, str]] = field(default=(), repr=False)
    key_files: Sequence[str] = ()
    cache_directory: str | None = None
    socket_directory: int | None = None


def server_needs(
    mountpoint: str,
    sources: Iterable[str],
    options: MountOptions,
    *,
    is_directory: bool,
    mode: int,
    uses_servers: bool,
    socket_directory: int | None,
) -> ServerNeeds:
    """Return what the server of a mount needs.

    Args:
        mountpoint: The mountpoint, absolute and free of symbolic links.
        sources: The images, or directories of images: absolute paths or URLs.
        options: The options of the mount.
        is_directory: Whether the mountpoint is a directory.
        mode: The permissions of the files of the disks.
        uses_servers: Whether a server, or a qemu-nbd process of the mount, serves an image or
            backing file.
        socket_directory: The descriptor of the directory of the socket for metrics; None for no
            such socket.
    """
    needs = ServerNeeds(
        mountpoint,
        is_directory=is_directory,
        modes=() if options.read_only else (mode, mode & ~0o222),
        writable=not options.read_only,
        socket_directory=socket_directory,
    )
    if not uses_servers:
        return needs
    # Only remote files need this module.
    from qedfuse.remote.storevariables import Variables, key_files  # noqa: PLC0415  see above

    addresses = (
        *(parse_address(source) for source in sources if is_url(source)),
        *options.backing_urls,
    )
    return replace(
        needs,
        uses_servers=True,
        addresses=addresses,
        variables=(*os.environ.items(), *options.credentials),
        key_files=(
            *key_files(Variables(dict(options.credentials)), {each.scheme for each in addresses}),
            *(() if options.credentials_file is None else (options.credentials_file,)),
        ),
        cache_directory=options.remote_cache_directory or _default_cache_directory(),
    )


def _default_cache_directory() -> str | None:
    """Return the user's directory for the cache; None if the user has no home directory."""
    from qedfuse.remote.cacheroot import default_directory  # noqa: PLC0415  only for remote files

    try:
        return default_directory()
    except CacheError:
        return None
