"""``mount -o remount``: changing what the kernel enforces, and refusing the rest.

The kernel can refuse writes by itself, so a disk that is open for writing can be made
read-only and writable again without its server.  A server that has opened its images
read-only cannot become a writer: that takes locks, a check of the image, and the
kernel's write-back cache, all of which are decided at the start.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import FuseError, MountpointError, PrivilegeError, QedError, UsageError
from qedfuse.mount.optionparser import is_in_effect, parse_options
from qedfuse.mount.optionsyntax import absolute_options, split_options
from qedfuse.mount.system.mountrecord import find_record
from qedfuse.mount.system.mounttable import find_qedfuse_mount
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.mount.options import MountOptions

_MS_REMOUNT: Final = 1 << 5
_READ_ONLY: Final = 1
_FLAGS: Final = {
    "ro": _READ_ONLY,
    "nosuid": 1 << 1,
    "nodev": 1 << 2,
    "noexec": 1 << 3,
    "sync": 1 << 4,
    "dirsync": 1 << 7,
    "nosymfollow": 1 << 8,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
}
"""Words for the kernel, from ``linux/mount.h``."""
_NEGATIONS: Final = {
    "rw": "ro",
    "exec": "noexec",
    "async": "sync",
    "symfollow": "nosymfollow",
    "atime": "noatime",
    "diratime": "nodiratime",
}
_ALWAYS: Final = ("nosuid", "nodev")
_FROM_TABLE: Final = ("user_id", "group_id", "blksize")
"""What mount(8) copies from the mount table and is no option of ours."""

_libc = ctypes.CDLL(None, use_errno=True)


def remount(
    mountpoint: str, texts: Iterable[str], *, fake: bool = False, sloppy: bool = False
) -> None:
    """Change a mount of qedfuse as far as the kernel can do it alone.

    Args:
        mountpoint: Where it is; absolute and free of links.
        texts: What stood behind each ``-o``.
        fake: Check everything and change nothing.
        sloppy: Drop unknown words, as mount(8)'s ``-s`` wants.

    Raises:
        MountpointError: There is no such mount, or a disk in it is open for writing.
        UsageError: An option cannot be changed.
        PrivilegeError: The caller is not root.
        FuseError: The kernel refuses.
    """
    entry = find_qedfuse_mount(mountpoint)
    found = find_record(entry.device, entry.owner)
    shown = printable(mountpoint)
    if found is None:
        msg = f"{shown}: found no note of its process, so nothing can be remounted"
        raise MountpointError(msg)
    flags, others = _sort(absolute_options(texts))
    _check(shown, parse_options(found[1].options, sloppy=True), flags, others, sloppy=sloppy)
    if fake:
        return
    number = sum(_FLAGS[word] for word in flags)
    place = os.fsencode(mountpoint)
    if _libc.mount(b"none", place, None, ctypes.c_ulong(_MS_REMOUNT | number), None) != 0:
        raise _error(shown, ctypes.get_errno())


def _sort(texts: Iterable[str]) -> tuple[set[str], list[str]]:
    """Split options into words for the kernel, as they stand in the end, and the others."""
    flags: set[str] = set(_ALWAYS)
    others: list[str] = []
    for word in (word for text in texts for word in split_options(text)):
        if word in _FLAGS:
            flags.add(word)
        elif word in _NEGATIONS:
            flags.discard(_NEGATIONS[word])
        elif word != "remount" and word.partition("=")[0] not in _FROM_TABLE:
            others.append(word)
    return flags, others


def _check(
    shown: str, old: MountOptions, flags: set[str], others: list[str], *, sloppy: bool
) -> None:
    """Refuse what the kernel cannot change without the server.

    Raises:
        UsageError: There is something.
    """
    if old.read_only and "ro" not in flags:
        msg = (
            f"{shown}: option rw: found images that are open read-only (unmount, and mount "
            "again with rw)"
        )
        raise UsageError(msg)
    for word in others:
        if word == "allow_other" and old.allow_root:
            continue  # from the mount table: the kernel knows allow_root by this name
        if not is_in_effect(word, old, sloppy=sloppy):
            msg = (
                f"{shown}: option {printable(word)}: cannot be changed by remount (unmount, and "
                "mount again)"
            )
            raise UsageError(msg)


def _error(shown: str, number: int) -> QedError:
    """Explain why the kernel has refused."""
    if number == errno.EPERM:
        return PrivilegeError(f"{shown}: cannot remount: only root may")
    if number == errno.EBUSY:
        return MountpointError(
            f"{shown}: cannot remount: in use: a disk is open for writing (a loop device or a "
            f"program has it open; see: losetup -l, fuser -vm {shown})"
        )
    return FuseError(f"{shown}: cannot remount: {os.strerror(number)}")
