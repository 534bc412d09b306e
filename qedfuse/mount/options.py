"""The options of a mount, and the check that no two of them exclude each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qedfuse.disk.options import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_COMMIT_SECONDS,
    DEFAULT_COMPACT_BYTES,
    DEFAULT_COMPACT_SECONDS,
    BackingPolicy,
)
from qedfuse.errors import UsageError
from qedfuse.remote.options import Deadlines, RemoteOptions

if TYPE_CHECKING:
    from qedfuse.mount.system.listenaddress import ListenAddress
    from qedfuse.mount.system.readahead import Readahead
    from qedfuse.remote.address import Address


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The options of one mount, as set by ``-o`` and by defaults; immutable.

    Attributes:
        read_only: The mount refuses all changes (``ro``).
        allow_other: Users other than the user who mounts may access the mount.
        allow_root: Besides the user who mounts, root may access the mount.
        uid: Owner of the disks and of their directory; None for the user who mounts.
        gid: Group of the disks and of their directory; None for the group of the user who mounts.
        umask: Permission bits that are removed from 0666 (read-only disks: 0444) for the disks, and
            from 0555 for their directory; None to remove all bits of group and others.
        direct_io: Reads and writes bypass the kernel's page cache.
        backing: Which backing files may be used.
        force_share: The mount is read-only, and another program may write to the images.
        nonempty: The mountpoint may be any disk image, not only one of the mounted images.
        growable: truncate(2), fallocate(2) and writes past the end enlarge the disk.
        truncate: Whether a truncation to a smaller size, an open with O_TRUNC included, is refused
            or writes zeros to the range that it cuts off.
        commit_seconds: Time in seconds from a change of a table until a background flush begins.
        cache_bytes: Maximum memory in bytes for the tables of one disk and of its backing files.
        discard: Whether a discard makes clusters free; if not, it writes zeros.
        detect_zeroes: How written zeros are stored (`OpenOptions`).
        free_list: Whether images keep a persistent free list (`OpenOptions`).
        compact: How far the image files are compacted when the mount ends (`OpenOptions`).
        compact_bytes: Maximum number of bytes that ``compact=auto`` moves in each image.
        compact_seconds: Approximate maximum time in seconds of ``compact=auto`` for all images.
        poll_seconds: Maximum time in seconds for which the server polls for the next request before
            it sleeps; None for the default, which is 0 if the server may run on one processor only.
        metrics: Where the metrics for Prometheus are served; None for nowhere.
        readahead: Maximum read-ahead of the kernel in bytes; ``kernel`` to keep the kernel's own
            read-ahead; None for the default of qedfuse.
        snapshot: Writes go to a temporary overlay and are dropped when the mount ends.
        overlay: Path of a QED image that gets all writes, and that is made if it is missing.
        base_changed: Whether to accept a base that has changed since the image was made over it.
        backing_urls: Prefixes of the URLs that images may name as backing files.
        remote_cache_directory: Directory of the cache for remote files; None for the default.
        remote_cache_bytes: Maximum space in bytes of this cache; None for no maximum.
        remote_seconds: Maximum time in seconds in which attempts of one request to a server begin.
        remote_connect_seconds: Maximum time in seconds to connect to a server.
        remote_attempt_seconds: Maximum time in seconds of one attempt.
        allow_http: Whether URLs with ``http://`` may name other machines than this one.
        allow_unpinned: Whether to read a file for which the server sends neither a strong ETag nor
            a time of modification.
        credentials_file: A file with credentials for servers; None for no file.
        credentials: The content of ``credentials_file``; empty before `with_credentials`.
        prefetch: ``all`` to fetch all data of the disks, while no reader waits for other data;
            ``off`` to fetch only what is read.
        partitions: Whether the mount has a file for each partition of each disk as well.
        partition: The number of the partition that is the only file of the mount; None to show the
            whole disk.
        sandbox: ``on`` to give up access that the server does not need, as far as the host supports
            it; ``strict`` to refuse the mount if the host lacks a part; ``off`` for no sandbox.
        memory_bytes: Limit of the server's address space in bytes; None for no limit.
        kernel_flags: Mount flags that the kernel enforces, such as ``noexec``.
    """

    read_only: bool = False
    allow_other: bool = False
    allow_root: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    direct_io: bool = False
    backing: BackingPolicy = BackingPolicy()  # noqa: RUF009  BackingPolicy is frozen
    force_share: bool = False
    nonempty: bool = False
    growable: bool = False
    truncate: Literal["refuse", "zero"] = "refuse"
    commit_seconds: float = DEFAULT_COMMIT_SECONDS
    cache_bytes: int = DEFAULT_CACHE_BYTES
    discard: bool = True
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    free_list: Literal["keep", "on", "off"] = "keep"
    compact: Literal["auto", "off", "full"] = "auto"
    compact_bytes: int = DEFAULT_COMPACT_BYTES
    compact_seconds: float = DEFAULT_COMPACT_SECONDS
    poll_seconds: float | None = None
    metrics: ListenAddress | None = None
    readahead: Readahead = None
    snapshot: bool = False
    overlay: str | None = None
    base_changed: bool = False
    backing_urls: tuple[Address, ...] = ()
    remote_cache_directory: str | None = None
    remote_cache_bytes: int | None = None
    remote_seconds: float = Deadlines().total_seconds
    remote_connect_seconds: float = Deadlines().connect_seconds
    remote_attempt_seconds: float = Deadlines().attempt_seconds
    allow_http: bool = False
    allow_unpinned: bool = False
    credentials_file: str | None = None
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    prefetch: Literal["off", "all"] = "off"
    partitions: bool = False
    partition: int | None = None
    sandbox: Literal["on", "off", "strict"] = "on"
    memory_bytes: int | None = None
    kernel_flags: tuple[str, ...] = ()

    @property
    def remote(self) -> RemoteOptions:
        """How remote files are read."""
        return RemoteOptions(
            cache_directory=self.remote_cache_directory,
            cache_bytes=self.remote_cache_bytes,
            deadlines=Deadlines.limited(
                self.remote_connect_seconds, self.remote_attempt_seconds, self.remote_seconds
            ),
            allow_http=self.allow_http,
            allow_unpinned=self.allow_unpinned,
            allowed=self.backing_urls,
            credentials=self.credentials,
            credentials_file=self.credentials_file,
        )

    def with_credentials(self) -> MountOptions:
        """Return the options with the content of the file with credentials.

        Raises:
            HostError: The file cannot be read.
            ImageError: The file is not a regular file.
            UsageError: The file gives permissions to others than its owner, is too long, or has a
                line that is not valid.
        """
        if self.credentials_file is None:
            return self
        # Imported late, because few mounts need credentials.
        from qedfuse.remote.credentials import read_credentials  # noqa: PLC0415

        return replace(self, credentials=read_credentials(self.credentials_file))

    def absolute(self) -> MountOptions:
        """Return the options with absolute paths, and with the present working directory.

        Raises:
            FileNotFoundError: A path is relative, and the working directory has been removed.
        """
        directories = tuple(str(Path(path).absolute()) for path in self.backing.directories)
        try:
            working_directory = os.getcwd()  # noqa: PTH109
        except OSError:
            # The working directory has been removed, so names ``file:PATH`` are relative to /.
            working_directory = "/"
        backing = replace(
            self.backing, directories=directories, working_directory=working_directory
        )
        return replace(
            self,
            overlay=_absolute(self.overlay),
            metrics=None if self.metrics is None else self.metrics.absolute(),
            remote_cache_directory=_absolute(self.remote_cache_directory),
            credentials_file=_absolute(self.credentials_file),
            backing=backing,
        )

    def for_read_only_disk(self) -> MountOptions:
        """Return the options for a disk that is read-only in a mount that is writable."""
        return replace(self, read_only=True, growable=False, compact="off")


def _absolute(path: str | None) -> str | None:
    """Return an absolute path for ``path``; None for None."""
    return None if path is None else str(Path(path).absolute())


def validated(options: MountOptions, *, explicit_rw: bool) -> MountOptions:
    """Check the options against each other, and return them; ``force_share`` sets ``read_only``.

    Args:
        options: The options.
        explicit_rw: Whether the user gave ``rw``, which excludes ``force_share``.

    Raises:
        UsageError: Two options exclude each other.
    """
    has_overlay = options.snapshot or options.overlay is not None
    overlay_option = "snapshot" if options.snapshot else "overlay"
    is_read_only = options.read_only or options.force_share
    read_only_option = "ro" if options.read_only else "force_share"
    conflicts = (
        (options.force_share and explicit_rw, "rw", "force_share"),
        (options.snapshot and options.overlay is not None, "snapshot", "overlay"),
        (has_overlay and options.force_share, overlay_option, "force_share"),
        (has_overlay and options.read_only, "ro", overlay_option),
        (options.compact == "full" and is_read_only, "compact=full", read_only_option),
        (options.growable and is_read_only, "growable", read_only_option),
        (options.partitions and options.partition is not None, "partitions", "partition"),
        (options.growable and options.partition is not None, "growable", "partition"),
        (options.truncate == "zero" and is_read_only, "truncate=zero", read_only_option),
        # The backing file of the overlay is the image that the user mounts.  So backing_format
        # would set its format, and backing=none would refuse it.
        (has_overlay and options.backing.format is not None, "backing_format", overlay_option),
        (has_overlay and options.backing.mode == "none", "backing=none", overlay_option),
        (bool(options.backing.directories) and options.backing.mode != "confined",
         "backing_dir", f"backing={options.backing.mode}"),
    )  # fmt: skip
    for is_conflict, first, second in conflicts:
        if is_conflict:
            msg = f"options {first} and {second} exclude each other"
            raise UsageError(msg)
    return replace(options, read_only=is_read_only)
