"""``mount -o remount``: changing mount flags that the kernel enforces, and no other option.

On a read-only mount the kernel itself refuses writes.  So a writable mount can become read-only,
and later writable again.  A mount whose images are open read-only cannot become writable: the
locks, the check of each image and the kernel's write-back cache are decided when the mount begins.

The kernel ignores ``dirsync`` in a remount.  With ``direct_io`` it leaves the flag ``sync`` to the
server, which knows only the value with which the mount began.  So a remount cannot change
``dirsync``, which stays as it was, and with ``direct_io`` it cannot change ``sync``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import FuseError, MountpointError, PrivilegeError, QedError, UsageError
from qedfuse.mount.optionparser import is_in_effect, parse_options
from qedfuse.mount.optionsyntax import absolute_options, split_options
from qedfuse.mount.system.mounttable import find_qedfuse_mount
from qedfuse.mount.system.recordlookup import find_record
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
"""Options that clear a mount flag, and the flag that each clears."""
_ALWAYS_SET: Final = ("nosuid", "nodev")
"""Mount flags that every mount of qedfuse has, and that no option clears."""
_KERNEL_FUSE_OPTIONS: Final = ("user_id", "group_id", "blksize")
"""Options that are ignored, because mount(8) copies them from the mount table."""

_libc = ctypes.CDLL(None, use_errno=True)


def remount(
    mountpoint: str, lists: Iterable[str], *, fake: bool = False, sloppy: bool = False
) -> None:
    """Set the mount flags of a mount to those in ``lists``; clear the flags that ``lists`` lacks.

    ``nosuid`` and ``nodev`` stay set, and ``relatime`` is set unless ``noatime`` is.

    Args:
        mountpoint: The mountpoint; absolute and free of symbolic links.
        lists: The arguments of all ``-o``, in order.  An option and its negation, such as ``sync``
            and ``async``, override each other: the later one counts.
        fake: Whether to check the options only, and to change nothing.
        sloppy: Whether to ignore unknown options (``-s`` of mount(8)).

    Raises:
        MountpointError: There is no mount of qedfuse on the mountpoint, the mount has no record, or
            a disk is open for writing and the mount would become read-only.
        UsageError: An option is invalid or cannot be changed.
        PrivilegeError: The caller is not root.
        FuseError: The kernel refuses for another reason.
        HostError: /proc is not mounted, or the record of the mount cannot be read.
    """
    entry = find_qedfuse_mount(mountpoint)
    found = find_record(entry.device, entry.owner)
    shown = printable(mountpoint)
    if found is None:
        msg = f"{shown}: cannot remount: found no record of the process that serves the mount"
        raise MountpointError(msg)
    flags, others = _split_flags(absolute_options(lists))
    # The record of a mount with ``-s`` has the unknown options too, which are dropped here.
    old = parse_options(found.record.options, sloppy=True)
    _refuse_changes(shown, old, flags, others, sloppy=sloppy)
    if fake:
        return
    if "noatime" not in flags:
        # Without any flag about times of access, the kernel would keep such flags of the mount, for
        # example an old ``noatime``.  ``relatime`` is the default.
        flags.add("relatime")
    bits = ctypes.c_ulong(_MS_REMOUNT | sum(_FLAGS[flag] for flag in flags))
    if _libc.mount(b"none", os.fsencode(mountpoint), None, bits, None) != 0:
        raise _error(shown, ctypes.get_errno())


def _split_flags(lists: Iterable[str]) -> tuple[set[str], list[str]]:
    """Split options into mount flags, those of `_ALWAYS_SET` included, and others to check."""
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
    """Raise UsageError if the options would change anything that a remount cannot change.

    ``old`` are the options with which the mount began; ``flags`` and ``others`` are the new ones.
    """
    if old.read_only and "ro" not in flags:
        msg = (
            f"{shown}: cannot become writable: found images that are open read-only (unmount, "
            "and mount again with rw)"
        )
        raise UsageError(msg)
    # A missing dirsync only stays set, which must not prevent a change to read-only.
    if "dirsync" in flags and "dirsync" not in old.kernel_flags:
        msg = f"{shown}: option dirsync: cannot be set by remount (unmount, and mount again)"
        raise UsageError(msg)
    if old.direct_io and ("sync" in flags) != ("sync" in old.kernel_flags):
        change, hint = ("set", "") if "sync" in flags else ("cleared", "repeat sync, or ")
        msg = (
            f"{shown}: option sync: cannot be {change} by remount with direct_io ({hint}unmount, "
            "and mount again)"
        )
        raise UsageError(msg)
    for option in others:
        if option == "allow_other" and old.allow_root:
            # The mount table shows allow_root as allow_other, and mount(8) copies it from there.
            continue
        if not is_in_effect(option, old, sloppy=sloppy):
            msg = (
                f"{shown}: option {printable(option)}: cannot be changed by remount (unmount, and "
                "mount again)"
            )
            raise UsageError(msg)


def _error(shown: str, number: int) -> QedError:
    """Return the error to raise for an errno of mount(2); ``shown`` is the mountpoint."""
    if number == errno.EPERM:
        return PrivilegeError(f"{shown}: cannot remount: only root may remount")
    if number == errno.EBUSY:
        return MountpointError(
            f"{shown}: cannot remount: in use: a loop device or a program has a disk open for "
            f"writing (see: losetup -l, fuser -vm {shown})"
        )
    return FuseError(f"{shown}: cannot remount: {os.strerror(number)}")
