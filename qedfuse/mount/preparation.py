"""Before the kernel is involved: checking the arguments of a mount, and opening its disks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3

from qedfuse.errors import UsageError
from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
from qedfuse.mount.images.coveredimage import refuse_image_as_mountpoint
from qedfuse.mount.images.naming import Source, find_sources
from qedfuse.mount.images.overlays import open_source
from qedfuse.mount.images.roles import find_read_only
from qedfuse.mount.system.mountpoint import check_mountpoint
from qedfuse.mount.system.mountpointlock import mountpoint_lock_name
from qedfuse.mount.system.privileges import check_privileges
from qedfuse.text import printable

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.window import DiskWindow
    from qedfuse.mount.options import MountOptions


@dataclass(frozen=True, slots=True)
class CheckedMount:
    """What `check_mount` has found out about a mount that it did not refuse.

    Attributes:
        sources: The images that were found.
        is_directory: Whether the mountpoint is a directory.
        lock_name: The name of the mountpoint's lock; None to mount without the lock.
    """

    sources: list[Source]
    is_directory: bool
    lock_name: bytes | None


def check_mount(
    paths: tuple[str, ...], mountpoint: str, options: MountOptions, *, is_fake: bool
) -> CheckedMount:
    """Find the images, and check that the mountpoint and the options suit them.

    Args:
        paths: Images, or directories of images: absolute paths or URLs.
        mountpoint: The mountpoint; absolute and free of symbolic links.
        options: The options.
        is_fake: Whether nothing will be mounted, so that no privileges are needed.

    Raises:
        QedError: The mount is refused.
    """
    if not options.nonempty:
        refuse_image_as_mountpoint(mountpoint, paths)
    sources = find_sources(paths)
    if options.overlay is not None and len(sources) != 1:
        msg = f"option overlay: found {len(sources)} images, expected one"
        raise UsageError(msg)
    if options.partition is not None and len(sources) != 1:
        msg = f"option partition: found {len(sources)} images, expected one"
        raise UsageError(msg)
    lock_name = mountpoint_lock_name(mountpoint)
    is_directory = check_mountpoint(mountpoint, len(sources))
    if options.partitions and not is_directory:
        msg = (
            f"{printable(mountpoint)}: option partitions: found a file as mountpoint, "
            "expected a directory; partition=NUMBER shows one partition"
        )
        raise UsageError(msg)
    if not is_fake:
        check_privileges(for_others=options.allow_other or options.allow_root)
    return CheckedMount(sources, is_directory, lock_name)


async def open_disks(
    stack: AsyncExitStack, sources: list[Source], options: MountOptions, *, is_directory: bool
) -> ExportedDisks:
    """Open one disk for each source; the caller closes the disks by closing ``stack``.

    Raises:
        QedError: An image cannot be opened.  The disks opened before it stay open in ``stack``.
    """
    disks = []
    first_inode = pyfuse3.ROOT_INODE + 1 if is_directory else pyfuse3.ROOT_INODE
    read_only = find_read_only(sources, options)
    for inode, source in enumerate(sources, first_inode):
        disk_options = options.for_read_only_disk() if source in read_only else options
        disk = await stack.enter_async_context(open_source(source.path, disk_options))
        content: Disk | DiskWindow = disk
        name = source.name
        if options.partition is not None:
            # Few mounts need the parsers of partition tables.
            from qedfuse.mount.images.partitionwindows import (  # noqa: PLC0415  late
                open_window,
                partition_name,
            )

            content = await open_window(disk, options.partition)
            name = partition_name(source.name, options.partition)
        disks.append(ExportedDisk(content, name, inode, read_only=source in read_only))
    return ExportedDisks(disks, with_partitions=options.partitions)
