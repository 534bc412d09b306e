"""Options for opening an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from qedfuse.hostio.locking import LockMode

DEFAULT_CACHE_BYTES: Final = 32 << 20
DEFAULT_COMMIT_SECONDS: Final = 5.0
DEFAULT_NEEDCHECK_SECONDS: Final = 5.0
DEFAULT_COMPACT_BYTES: Final = 64 << 20
DEFAULT_COMPACT_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class BackingPolicy:
    """Which backing files an image may use; docs/security.md explains why this is limited.

    Attributes:
        mode: ``confined`` allows bases in the directory of the image that names them,
            ``any`` allows all files, ``none`` allows no base.
        directories: Further directories that a base may lie in.
        format: The format of every base; None to decide by header and magic.
        trusted: A path that is allowed as the first base because the user has named it.
        working_directory: The directory that names after ``file:`` are relative to; empty
            for the working directory of the process at the time of opening.
    """

    mode: Literal["confined", "any", "none"] = "confined"
    directories: tuple[str, ...] = ()
    format: Literal["raw", "qed"] | None = None
    trusted: str | None = None
    working_directory: str = ""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """Options for opening an image.

    Attributes:
        writable: Open for writing, which excludes all other openers.
        force_share: Open read-only while another process may write; reads may return torn
            or stale data.
        lock: Take the locks that QEMU understands.
        backing: Which backing files may be used.
        cache_bytes: Memory in bytes for tables, shared by all images of the chain.
        commit_seconds: Longest time in seconds that changed tables stay in memory only.
        needcheck_seconds: Idle time in seconds after which NEED_CHECK is cleared.
        discard: Whether discards deallocate clusters; if not, they write zeros in place.
        detect_zeroes: Whether written clusters of zeros are stored as data (``off``), are
            not allocated (``on``), or are also deallocated (``unmap``).
        free_list: Whether a list of the free clusters is stored in the image when it is
            closed: always (``on``), never (``off``), or if the image had one when it was
            opened (``keep``).
        compact: Whether the highest clusters move into free ones when the image is closed:
            as far as the two limits allow (``auto``), all of them (``full``), or none
            (``off``).  ``auto`` moves nothing if the tables did not change, if the image
            keeps a list of its free clusters, or without ``discard``.
        compact_bytes: Most bytes that ``auto`` moves.
        compact_seconds: About how long ``auto`` may take.  Clusters moved by then stay moved.
    """

    writable: bool = False
    force_share: bool = False
    lock: bool = True
    backing: BackingPolicy = field(default_factory=BackingPolicy)
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
        """The mode in which the image is locked for reading only, whatever ``writable`` is.

        None if no lock is taken.
        """
        return LockMode.to_read(share=self.force_share) if self.lock else None
