"""The filter of system calls (seccomp), which libseccomp makes.

A call that is not permitted fails with EPERM, or with ENOSYS (`systemcalls.NOT_IMPLEMENTED`).  It
does not end the process, because a server that is killed loses changes of tables that are not
durable yet.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qedfuse.mount.sandbox import systemcalls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LIBRARY: Final = "libseccomp.so.2"

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_REFUSE: Final = _ERRNO | errno.EPERM
_BAD_ARCHITECTURE, _SYNC_THREADS, _LOG, _OPTIMIZE = 2, 4, 6, 8
"""Attributes of a filter (seccomp_attr_set(3))."""
_EQUAL, _MASKED_EQUAL = 4, 7
"""Comparisons of an argument (seccomp_rule_add(3))."""
_BINARY_TREE: Final = 2
"""The value of the attribute `_OPTIMIZE` that makes the filter search a binary tree."""

_THREAD_FLAGS: Final = 0x100 | 0x10000
"""CLONE_VM and CLONE_THREAD, with which clone(2) makes a thread, never a process."""
_TYPE_MASK: Final = 0xF
"""The bits of the second argument of socketpair(2) without the flags (SOCK_TYPE_MASK)."""
_SET_NAME: Final = 15
"""PR_SET_NAME, which names a thread."""
_FIRST, _SECOND, _THIRD, _FIFTH = 0, 1, 2, 4
"""Indices of the arguments of a system call."""
_FAMILIES_OF_NETWORKS: Final = (socket.AF_INET, socket.AF_INET6)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp: a condition on one argument of a system call."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class CallNeeds:
    """The system calls that a mount needs besides those that every mount needs.

    Attributes:
        network: Whether sockets for servers on a network are needed.
        host: Whether Unix sockets, for servers on this host, are needed.
        kill: Whether calls that send signals, to end qemu-nbd, are needed.
        modes: The permissions that chmod(2) may set; empty for none.
        log: Whether the kernel logs refused calls (audit).
    """

    network: bool
    host: bool
    kill: bool
    modes: Sequence[int]
    log: bool


class CallFilter:
    """A filter that is made by the constructor, and put into force by `load`.

    Attributes:
        count: The number of permitted system calls.
    """

    def __init__(self, needs: CallNeeds) -> None:
        """Make the filter.

        Raises:
            OSError: libseccomp is not installed or fails; ``strerror`` has the reason.
        """
        try:
            self._library = library = ctypes.CDLL(_LIBRARY, use_errno=True)
        except OSError as error:
            msg = f"found no library {_LIBRARY}"
            raise OSError(errno.ENOENT, msg) from error
        initialize = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(("seccomp_init", library))
        address = initialize(_REFUSE)
        self._context = ctypes.c_void_p(address)
        if not address:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        attributes = {_BAD_ARCHITECTURE: _REFUSE, _SYNC_THREADS: 1, _LOG: int(needs.log)}
        for attribute, value in attributes.items():
            self._set(attribute, value)
        # An older libseccomp makes a list instead, which is only slower.
        with suppress(OSError):
            self._set(_OPTIMIZE, _BINARY_TREE)
        permitted = set()
        for name, action, comparisons in _rules(needs):
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number < 0:  # unknown, or not a call of this architecture
                continue
            array = (_Comparison * len(comparisons))(*comparisons)
            add = library.seccomp_rule_add_array
            _require(add(self._context, ctypes.c_uint32(action), number, len(comparisons), array))
            if action == _ALLOW:
                permitted.add(number)
        self.count = len(permitted)

    def _set(self, attribute: int, value: int) -> None:
        """Set an attribute; raise OSError if libseccomp refuses."""
        _require(self._library.seccomp_attr_set(self._context, attribute, ctypes.c_uint32(value)))

    def load(self) -> None:
        """Put the filter into force for all threads; afterwards the object cannot be used any more.

        Raises:
            OSError: The kernel refused.
        """
        try:
            _require(self._library.seccomp_load(self._context))
        finally:
            self._library.seccomp_release(self._context)


def _rules(needs: CallNeeds) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield rules: the name of a system call, the action, and the conditions on its arguments."""
    for name in systemcalls.ALWAYS:
        yield name, _ALLOW, []
    for name in systemcalls.KILL if needs.kill else ():
        yield name, _ALLOW, []
    for name in systemcalls.NOT_IMPLEMENTED:
        yield name, _ERRNO | errno.ENOSYS, []
    # See clone(2) for the order of its arguments.
    flags = _SECOND if os.uname().machine.startswith("s390") else _FIRST
    yield "clone", _ALLOW, [_Comparison(flags, _MASKED_EQUAL, _THREAD_FLAGS, _THREAD_FLAGS)]
    yield "prctl", _ALLOW, [_Comparison(_FIRST, _EQUAL, _SET_NAME, 0)]
    for command in systemcalls.IOCTLS.values():
        yield "ioctl", _ALLOW, [_Comparison(_SECOND, _EQUAL, command, 0)]
    yield from _socket_rules(needs)
    # Without a condition, these calls could act on other processes of the same user.
    own = os.getpid()
    yield "tgkill", _ALLOW, [_Comparison(_FIRST, _EQUAL, own, 0)]
    for pid in (0, own):
        yield "prlimit64", _ALLOW, [_Comparison(_FIRST, _EQUAL, pid, 0)]
    for mode in needs.modes:
        for name in systemcalls.CHMOD:
            at = _SECOND if name == "chmod" else _THIRD
            yield name, _ALLOW, [_Comparison(at, _EQUAL, mode, 0)]


def _socket_rules(needs: CallNeeds) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield the rules for making and connecting sockets, as `_rules` does."""
    # Each request to the unmounter, a helper process, makes a pair of sockets.
    yield (
        "socketpair",
        _ALLOW,
        [_Comparison(_SECOND, _MASKED_EQUAL, _TYPE_MASK, socket.SOCK_SEQPACKET)],
    )
    # On some architectures the C library makes send(2) by sendto(2) without an address.
    yield "sendto", _ALLOW, [_Comparison(_FIFTH, _EQUAL, 0, 0)]
    families = (
        *(_FAMILIES_OF_NETWORKS if needs.network else ()),
        *((socket.AF_UNIX,) if needs.host else ()),
    )
    for family in families:
        yield "socket", _ALLOW, [_Comparison(_FIRST, _EQUAL, family, 0)]
    for name in systemcalls.CONNECT if families else ():
        yield name, _ALLOW, []
    if needs.network:  # getaddrinfo(3) asks the kernel for the addresses of the host
        netlink = [_Comparison(_FIRST, _EQUAL, socket.AF_NETLINK, 0),
                   _Comparison(_THIRD, _EQUAL, socket.NETLINK_ROUTE, 0)]  # fmt: skip
        yield "socket", _ALLOW, netlink


def _require(result: int) -> None:
    """Raise OSError for a negative errno that libseccomp has returned."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
