"""The options of a mount, and which of them exclude each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qedfuse.disk.options import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_COMMIT_SECONDS,
    DEFAULT_COMPACT_BYTES,
    DEFAULT_COMPACT_SECONDS,
    BackingPolicy,
)
from qedfuse.errors import UsageError

if TYPE_CHECKING:
    from qedfuse.mount.system.readahead import Readahead


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The options of one mount, which ``-o`` sets; immutable.

    Attributes:
        read_only: The mount refuses all changes (``ro``).
        allow_other: Users other than the caller may access the mount.
        allow_root: Besides the caller, root may access the mount.
        uid: Owner of the disks; None for the caller.
        gid: Group of the disks; None for the caller's.
        umask: Permission bits cleared from 0666; None clears all but the owner's.
        direct_io: The kernel's page cache is not used.
        backing: Which backing files may be used.
        force_share: Read-only, without a lock against a program that writes to the image.
        growable: truncate(2) and writes past the end enlarge the disk.
        truncate: Whether a truncation to a smaller size, an open with O_TRUNC included, is
            refused or writes zeros to the range that it cuts off.
        commit_seconds: Longest time for which changed tables stay in memory only.
        cache_bytes: Memory for tables, for each image.
        discard: Discards free clusters; otherwise they write zeros.
        detect_zeroes: How written zeros are stored (`OpenOptions`).
        free_list: Whether images keep a persistent free list (`OpenOptions`).
        compact: How far the image files are compacted when the mount ends (`OpenOptions`).
        compact_bytes: Bytes that ``auto`` may move in each of them.
        compact_seconds: Time that ``auto`` may take for all of them together.
        poll_seconds: Longest time for which the server polls for the next request; None for
            the default of the machine.
        readahead: Length of the kernel's read-ahead (`qedfuse.mount.system.readahead`).
        snapshot: Writes go to a temporary overlay and are dropped when the mount ends.
        overlay: Writes go to this QED image, which is made if missing.
        kernel_flags: Mount flags that the kernel enforces, such as ``noexec``.
    """

    read_only: bool = False
    allow_other: bool = False
    allow_root: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    direct_io: bool = False
    backing: BackingPolicy = BackingPolicy()  # noqa: RUF009  frozen
    force_share: bool = False
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
    readahead: Readahead = None
    snapshot: bool = False
    overlay: str | None = None
    kernel_flags: tuple[str, ...] = ()

    def absolute(self) -> MountOptions:
        """Return the options with paths that do not depend on the working directory."""
        directories = tuple(map(os.path.abspath, self.backing.directories))
        overlay = None if self.overlay is None else os.path.abspath(self.overlay)  # noqa: PTH100
        try:
            working = os.getcwd()  # noqa: PTH109
        except OSError:  # it has been removed; relative names are not found
            working = "/"
        backing = replace(self.backing, directories=directories, working_directory=working)
        return replace(self, overlay=overlay, backing=backing)

    def for_read_only_disk(self) -> MountOptions:
        """Return the options for a disk that is read-only in a mount that is writable."""
        return replace(self, read_only=True, growable=False, compact="off")


def consistent(options: MountOptions, *, explicit_rw: bool) -> MountOptions:
    """Return options with those set that others imply.

    Args:
        options: The options.
        explicit_rw: Whether ``rw`` was given, and is not only the default.

    Raises:
        UsageError: Two options exclude each other.
    """
    written = options.snapshot or options.overlay is not None
    writer = "snapshot" if options.snapshot else "overlay"
    reads_only = options.read_only or options.force_share
    contradictions = (
        (options.force_share and explicit_rw, "rw", "force_share"),
        (options.snapshot and options.overlay is not None, "snapshot", "overlay"),
        (written and options.force_share, writer, "force_share"),
        (written and options.read_only, "ro", writer),
        (options.compact == "full" and reads_only, "compact", "ro"),
        (options.growable and reads_only, "growable", "ro"),
        (options.truncate == "zero" and reads_only, "truncate=zero", "ro"),
        # The source becomes the backing file of the overlay, so options about backing files
        # would apply to the source itself.
        (written and options.backing.format is not None, "backing_format", writer),
        (written and options.backing.mode == "none", "backing=none", writer),
        (bool(options.backing.directories) and options.backing.mode != "confined",
         "backing_dir", f"backing={options.backing.mode}"),
    )  # fmt: skip
    for wrong, first, second in contradictions:
        if wrong:
            msg = f"options {first} and {second}: exclude each other"
            raise UsageError(msg)
    return replace(options, read_only=reads_only)
