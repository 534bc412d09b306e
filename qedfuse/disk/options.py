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
        format: The format of every base, as QEMU calls it; None to decide for each base by the
            header of the image that names it, and by the first bytes of the base.
        foreign: ``qemu`` allows images to name bases in formats that only QEMU reads.  ``off``
            forbids such a base, unless the user has named the base or given its format.
        trusted: A path or URL that the user has named as the first base; None for none.  Ignored if
            the mode is ``none``.
        base_changed: Whether to accept a base of another version than the image remembers.  An
            image that is opened for writing then remembers the version of the base that it has.
        working_directory: The directory to which a relative PATH belongs in a backing file name of
            the form ``file:PATH``; empty for the working directory of the process.
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
        writable: Whether to open for writing.  This excludes all other openers that lock the
            image, except readers with ``force_share``.
        force_share: Whether to open even while another process has the image open for writing;
            reads may then return torn or stale data.  Cannot be combined with ``writable``.
        lock: Whether to take locks, which QEMU respects as well.
        backing: Which backing files may be used.
        remote: How URLs are read, and which URLs an image may name as its backing file.
        cache_bytes: Maximum memory in bytes for tables of the whole chain.  What is in use, or has
            changes that are not in the file yet, stays even above the maximum.
        commit_seconds: Seconds from a change until a background flush begins.
        needcheck_seconds: Seconds without a change of the tables after which NEED_CHECK is cleared.
        discard: Whether discards deallocate clusters; if not, they write zeros.
        detect_zeroes: How a write of zeros over a whole cluster is stored: as data (``off``); as
            data only if the cluster is allocated already (``on``); or always without data
            (``unmap``).
        free_list: Whether a list of the free clusters is stored in the image when it is closed:
            whenever possible (``on``), never (``off``), or if the image had one (``keep``).
        compact: Whether the highest clusters move into free ones when the image is closed: within
            ``compact_bytes`` and ``compact_seconds`` (``auto``), until the file is as short as
            possible (``full``), or not at all (``off``).  ``auto`` moves nothing if the tables did
            not change, if the image keeps a free list, or if ``discard`` is False.
        compact_bytes: Maximum number of bytes that ``auto`` moves.
        compact_seconds: Approximate maximum time that ``auto`` takes, in seconds.
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
        """The mode in which a reader locks the image; None if no lock is taken."""
        return LockMode.to_read(share=self.force_share) if self.lock else None
