"""Opening the file of an image: a local file, or a URL."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.hostio.imagefile import open_image_file
from qedfuse.remote.address import is_url, parse_address, require_local
from qedfuse.util.threads import open_in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.hostio.locking import LockMode
    from qedfuse.remote.options import RemoteOptions


@asynccontextmanager
async def open_image(
    path: str, lock: LockMode | None, remote: RemoteOptions, *, writable: bool = False
) -> AsyncIterator[HostFile]:
    """Open a regular file and lock it, or open a URL; close the file at the end of the block.

    The block may also close the file earlier.

    Args:
        path: The path of the file, or the URL.
        lock: The mode in which to lock a file; None for no lock.  A URL is never locked.
        remote: How to read a URL.
        writable: Whether to open the file for writing as well.

    Raises:
        UsageError: A URL is not valid, not permitted by the options, or ``writable`` is set for it.
        HostError: The file cannot be opened or locked, the server does not serve the object, or
            the cache for URLs cannot be used.
        ImageError: The file is not a regular file.
        ImageInUseError: Another program holds a lock that excludes this one.
    """
    if not is_url(path):
        with open_image_file(path, lock, writable=writable) as file:
            yield file
        return
    if writable:
        require_local(path)
    remote_file = await open_url(path, remote)
    try:
        yield remote_file
    finally:
        remote_file.close()


async def open_url(
    url: str, remote: RemoteOptions, wanted: tuple[int, str] | None = None
) -> HostFile:
    """Open a URL; the caller must close the returned file.

    Args:
        url: The URL.
        remote: How to read the URL.
        wanted: Size and validator of the version that the caller needs; None for any.  If the
            server has another version now, but the cache has the whole wanted one, the cached
            version is opened (`open_remote`).

    Raises:
        UsageError: The URL is not valid, or the options do not permit it.
        RemoteError: The server cannot be reached, or does not serve the object.
        CacheError: The user has named a directory for the cache that cannot be used.
        HostError: The data file of the cache cannot be opened.
    """
    address = parse_address(url)
    call: Callable[[], HostFile]
    # Imported late: only URLs need these modules.
    if address.is_nbd:
        from qedfuse.nbd.export import open_export  # noqa: PLC0415  late, see above

        call = partial(open_export, address, remote.deadlines)
    else:
        from qedfuse.remote.opening import open_remote  # noqa: PLC0415  late, see above

        call = partial(open_remote, address, remote, wanted)
    # A task that is cancelled does not wait for the server.
    return await open_in_thread(call, lambda file: file.close())
