"""How an image is to be opened."""

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
    """Which backing files an image may use.  An image is hostile input: see docs/security.md.

    Attributes:
        mode: ``confined`` to the directory of the image that names the base, ``any``
            file, or ``none`` at all.
        directories: Further directories that a base may lie in.
        format: What every base is taken for, whatever its magic says.
        trusted: A file that the user named himself, allowed as the first base.
        working_directory: Where names after ``file:`` begin; empty for the working
            directory that the process has when it opens them.
    """

    mode: Literal["confined", "any", "none"] = "confined"
    directories: tuple[str, ...] = ()
    format: Literal["raw", "qed"] | None = None
    trusted: str | None = None
    working_directory: str = ""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How an image is to be opened.

    Attributes:
        writable: Open for writing; nobody else may have the image open then.
        force_share: Read-only beside a writer; what is read may be torn or stale.
        lock: Take the locks that QEMU understands.
        backing: Which backing files may be used.
        cache_bytes: Memory for tables, shared by all images of the chain.
        commit_seconds: Longest time that changed tables stay in memory only.
        needcheck_seconds: Idle time after which NEED_CHECK is cleared.
        discard: Whether discards give clusters up; if not, they write zeros in place.
        detect_zeroes: Whether whole clusters of zeros are stored as data (``off``), take
            no new cluster (``on``), or give up theirs as well (``unmap``).
        free_list: Whether the image keeps a list of its free clusters when it is closed;
            ``keep``: if it had one when it was opened.
        compact: Whether the highest clusters move into free ones when the image is closed:
            as far as the two limits allow (``auto``), all of them (``full``), or none
            (``off``).  ``auto`` leaves an image alone whose tables did not change, that
            keeps a list of its free clusters, or that is open without ``discard``.
        compact_bytes: How much ``auto`` may move.
        compact_seconds: How long ``auto`` may take, about; it ends where it is then.
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
        """What to lock the image itself for; None if it is not to be locked."""
        if not self.lock:
            return None
        return LockMode.WRITE if self.writable else self.read_lock

    @property
    def read_lock(self) -> LockMode | None:
        """What to lock the image for where it is only read, whatever ``writable`` is."""
        return LockMode.to_read(share=self.force_share) if self.lock else None
