"""``mount -o remount``: changing the flags that the kernel enforces; all else is refused.

The kernel can refuse writes by itself, so a writable mount can be made read-only and writable
again without its server.  A server that has opened its images read-only cannot become a
writer: that would take locks, a check of the image, and the kernel's write-back cache, all of
which are decided when the mount begins.
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
_MS_RDONLY: Final = 1
_FLAGS: Final = {
    "ro": _MS_RDONLY,
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
"""Options that are mount flags, with their values from ``linux/mount.h``."""
_NEGATIONS: Final = {
    "rw": "ro",
    "exec": "noexec",
    "async": "sync",
    "symfollow": "nosymfollow",
    "atime": "noatime",
    "diratime": "nodiratime",
}
"""Options that clear a mount flag."""
_ALWAYS_SET: Final = ("nosuid", "nodev")
_KERNEL_FUSE_OPTIONS: Final = ("user_id", "group_id", "blksize")
"""Options that the kernel shows for every FUSE mount, and that mount(8) copies from there."""

_libc = ctypes.CDLL(None, use_errno=True)


def remount(
    mountpoint: str, lists: Iterable[str], *, fake: bool = False, sloppy: bool = False
) -> None:
    """Change the flags of a mount that the kernel can change without the server.

    Args:
        mountpoint: The mountpoint; absolute and free of symbolic links.
        lists: The arguments of all ``-o``.
        fake: Check everything and change nothing.
        sloppy: Drop unknown options (``-s`` of mount(8)).

    Raises:
        MountpointError: There is no mount of qedfuse, no record of it, or a disk in it is open
            for writing.
        UsageError: An option is invalid or cannot be changed.
        PrivilegeError: The caller is not root.
        FuseError: The kernel refuses.
    """
    entry = find_qedfuse_mount(mountpoint)
    found = find_record(entry.device, entry.owner)
    shown = printable(mountpoint)
    if found is None:
        msg = f"{shown}: cannot remount: found no record of the process that serves it"
        raise MountpointError(msg)
    flags, others = _split_flags(absolute_options(lists))
    _refuse_changes(
        shown, parse_options(found.record.options, sloppy=True), flags, others, sloppy=sloppy
    )
    if fake:
        return
    bits = ctypes.c_ulong(_MS_REMOUNT | sum(_FLAGS[flag] for flag in flags))
    if _libc.mount(b"none", os.fsencode(mountpoint), None, bits, None) != 0:
        raise _error(shown, ctypes.get_errno())


def _split_flags(lists: Iterable[str]) -> tuple[set[str], list[str]]:
    """Return the mount flags that lists of options result in, and all other options."""
    flags: set[str] = set(_ALWAYS_SET)
    others: list[str] = []
    for option in (option for text in lists for option in split_options(text)):
        if option in _FLAGS:
            flags.add(option)
        elif option in _NEGATIONS:
            flags.discard(_NEGATIONS[option])
        elif option != "remount" and option.partition("=")[0] not in _KERNEL_FUSE_OPTIONS:
            others.append(option)
    return flags, others


def _refuse_changes(
    shown: str, old: MountOptions, flags: set[str], others: list[str], *, sloppy: bool
) -> None:
    """Refuse changes that the kernel cannot make without the server.

    Args:
        shown: The mountpoint, for messages.
        old: The options of the mount.
        flags: The new mount flags.
        others: The other options.
        sloppy: Drop unknown options.

    Raises:
        UsageError: An option is unknown or would change the mount.
    """
    if old.read_only and "ro" not in flags:
        msg = (
            f"{shown}: option rw: found images that are open read-only (unmount, and mount "
            "again with rw)"
        )
        raise UsageError(msg)
    for option in others:
        if option == "allow_other" and old.allow_root:
            continue  # from the mount table: allow_root is allow_other for the kernel
        if not is_in_effect(option, old, sloppy=sloppy):
            msg = (
                f"{shown}: option {printable(option)}: cannot be changed by remount (unmount, and "
                "mount again)"
            )
            raise UsageError(msg)


def _error(shown: str, number: int) -> QedError:
    """Return the error for an errno of mount(2)."""
    if number == errno.EPERM:
        return PrivilegeError(f"{shown}: cannot remount: only root may do this")
    if number == errno.EBUSY:
        return MountpointError(
            f"{shown}: cannot remount: in use: a disk is open for writing (a loop device or a "
            f"program has it open; see: losetup -l, fuser -vm {shown})"
        )
    return FuseError(f"{shown}: cannot remount: {os.strerror(number)}")
