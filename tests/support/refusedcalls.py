"""System calls that fail in one thread, as in a sandbox that does not know them (seccomp(2))."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

CACHESTAT: Final = 451
MINCORE: Final = {"x86_64": 27, "i686": 218, "armv7l": 219}.get(os.uname().machine, 232)
"""Numbers of system calls; the first is the same on all architectures."""

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
"""PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, and SECCOMP_MODE_FILTER."""
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
"""Instructions of the filter (linux/bpf_common.h); the number is the first word of its data."""
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

T = TypeVar("T")


def run_without(number: int, function: Callable[[], T]) -> T:
    """Call a function in a thread in which a system call fails with EPERM; return its result."""

    def refuse_and_call() -> T:
        instructions = [
            (_LOAD_NUMBER, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
        kept = ctypes.create_string_buffer(code)
        program = ctypes.create_string_buffer(
            struct.pack("@HP", len(instructions), ctypes.addressof(kept))
        )
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for arguments in ((_SET_NO_NEW_PRIVILEGES, 1, 0), (_SET_SECCOMP, _FILTER, program)):
            if prctl(*arguments, 0, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(refuse_and_call).result()
