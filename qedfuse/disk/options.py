"""Options for opening an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from qedfuse.hostio.locking import LockMode
from qedfuse.remote.options import RemoteOptions

DEFAULT_CACHE_BYTES: Final = 32 << 20
DEFAULT_COMMIT_SECONDS: Final = 5.0
DEFAULT_NEEDCHECK_SECONDS: Final = 5.0
DEFAULT_COMPACT_BYTES: Final = 64 << 20
DEFAULT_COMPACT_SECONDS: Final = 1.0


BackingFormat: TypeAlias = Literal[
    "raw", "qed", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow"
]
"""A format of a backing file, as QEMU calls it."""


@dataclass(frozen=True, slots=True)
class BackingPolicy:
    """Which backing files an image may use; docs/security.md explains why not all.

    Attributes:
        mode: ``confined`` allows bases inside the directory of the image that names them, or
            inside ``directories``; ``any`` allows all files; ``none`` allows no base.
        directories: Further directories that a base may lie in.
        format: The format of every base, with the name that QEMU has for it; None to decide for
            each base by the header of the image that names it and by the magic of the base.
        foreign: ``qemu`` allows images to name bases in formats other than QED and raw, which
            QEMU then serves.  ``off`` forbids such a base, unless the user has named the base or
            given its format.
        trusted: A path or URL that is allowed as the first base because the user has named it;
            None if the user has named no base.  Ignored if the mode is ``none``.
        base_changed: Whether to accept a base of another version than the one that the image
            remembers, and to remember the new version if the image is opened for writing.
        working_directory: The directory to which the path in a backing file name of the form
            ``file:PATH`` is relative; empty for the working directory of the process at the
            time of opening.
    """

    mode: Literal["confined", "any", "none"] = "confined"
    directories: tuple[str, ...] = ()
    format: BackingFormat | None = None
    foreign: Literal["off", "qemu"] = "off"
    trusted: str | None = None
    base_changed: bool = False
    working_directory: str = ""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening an image.

    Attributes:
        writable: Whether to open for writing.  The lock on the image then excludes all other
            openers that lock it, except those with ``force_share``.
        force_share: Whether to open even while another process has the image open for
            writing; reads may then return torn or stale data.  Refused together with
            ``writable``.
        lock: Whether to take locks, which QEMU respects as well.
        backing: Which backing files may be used.
        remote: How URLs are read, and which URLs an image may name as its backing file.
        cache_bytes: Maximum memory in bytes for tables, shared by all images of the chain.
            Parts of tables stay in memory even above the maximum while they are in use, or while
            their changes are not in the file yet.
        commit_seconds: Seconds from a change until a background flush begins, which makes
            the change durable.
        needcheck_seconds: Seconds without a change of the tables after which NEED_CHECK is
            cleared.
        discard: Whether discards deallocate clusters; if not, they write zeros over allocated
            clusters, which stay allocated.
        detect_zeroes: How a write of zeros over a whole cluster is stored: as data (``off``); as
            data if the cluster is allocated already, otherwise without data (``on``); or always
            without data, so that an allocated cluster is deallocated (``unmap``).
        free_list: Whether a list of the free clusters is stored in the image when it is
            closed: whenever possible (``on``), never (``off``), or whenever possible if the image
            had one when it was opened (``keep``).
        compact: Whether the highest clusters move into free ones when the image is closed:
            as far as ``compact_bytes`` and ``compact_seconds`` allow (``auto``), until the file is
            as short as possible (``full``), or not at all (``off``).  ``auto`` moves nothing if
            the tables did not change, if the image keeps a list of its free clusters, or if
            ``discard`` is False.
        compact_bytes: Maximum number of bytes that ``auto`` moves.
        compact_seconds: Approximate maximum time that ``auto`` takes, in seconds.  Clusters that
            were moved within this time stay moved.
    """

    writable: bool = False
    force_share: bool = False
    lock: bool = True
    backing: BackingPolicy = field(default_factory=BackingPolicy)
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    cache_bytes: int = DEFAULT_CACHE_BYTES
    commit_seconds: float = DEFAULT_COMMIT_SECONDS
    needcheck_seconds: float = DEFAULT_NEEDCHECK_SECONDS
    discard: bool = True
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    free_list: Literal["keep", "on", "off"] = "keep"
    compact: Literal["auto", "off", "full"] = "auto"
    compact_bytes: int = DEFAULT_COMPACT_BYTES
    compact_seconds: float = DEFAULT_COMPACT_SECONDS

    @property
    def image_lock(self) -> LockMode | None:
        """The mode in which the image itself is locked; None if no lock is taken."""
        if not self.lock:
            return None
        return LockMode.WRITE if self.writable else self.read_lock

    @property
    def read_lock(self) -> LockMode | None:
        """The mode in which a reader locks the image, whatever ``writable`` is.

        None if no lock is taken.
        """
        return LockMode.to_read(share=self.force_share) if self.lock else None
