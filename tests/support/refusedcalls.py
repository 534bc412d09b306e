"""System calls that fail in one thread, as in a sandbox that does not know them (seccomp(2))."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

CACHESTAT: Final = 451
CLONE3: Final = 435
MINCORE: Final = {"x86_64": 27, "i686": 218, "armv7l": 219}.get(os.uname().machine, 232)
_SECCOMP: Final = {"x86_64": 317, "i686": 354, "armv7l": 383}.get(os.uname().machine, 277)
"""Numbers of system calls; the first two are the same on all architectures."""

_SET_NO_NEW_PRIVILEGES, _SET_FILTER, _NEW_LISTENER = 38, 1, 8
"""PR_SET_NO_NEW_PRIVS, SECCOMP_SET_MODE_FILTER, and SECCOMP_FILTER_FLAG_NEW_LISTENER."""
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
"""Instructions of the filter (linux/bpf_common.h); the number is the first word of its data."""
_ALLOW, _ERRNO, _NOTIFY = 0x7FFF0000, 0x00050000, 0x7FC00000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
"""SECCOMP_IOCTL_NOTIF_RECV, which fills 80 bytes, and SECCOMP_IOCTL_NOTIF_SEND."""

_WAIT_SECONDS: Final = 60.0
"""After this time a system call counts as not made."""

T = TypeVar("T")


def run_without(number: int, function: Callable[[], T]) -> T:
    """Call a function in a thread in which a system call fails with EPERM; return its result."""

    def refuse_and_call() -> T:
        _filter_call(number, _ERRNO | errno.EPERM, 0)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(refuse_and_call).result()


def run_with_late_refusal(number: int, delay: Callable[[], object], function: Callable[[], T]) -> T:
    """Call a function in a thread in which one system call fails with EPERM after a delay.

    The system call lasts until ``delay``, which a forked process calls during it, has returned.
    Raises AssertionError if ``function`` does not make the system call, or if ``delay`` fails.
    """

    def refuse_and_call() -> T:
        listener = _filter_call(number, _NOTIFY, _NEW_LISTENER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads
            child = os.fork()
        if child == 0:
            _refuse_late(listener, delay)
        os.close(listener)
        try:
            return function()
        finally:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(refuse_and_call).result()


def _refuse_late(listener: int, delay: Callable[[], object]) -> NoReturn:
    """Wait for a system call, call a function, refuse the system call, and end the process."""
    code = 1
    try:
        assert select.select([listener], [], [], _WAIT_SECONDS)[0], "no such system call was made"
        notification = fcntl.ioctl(listener, _RECEIVE, bytes(80))
        delay()
        # The identification of the system call, its result, its error and no flags.
        answer = struct.pack("=8sqiI", notification[:8], 0, -errno.EPERM, 0)
        fcntl.ioctl(listener, _SEND, answer)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def _filter_call(number: int, action: int, flags: int) -> int:
    """Let a filter decide about a system call of the calling thread; return what seccomp(2) does.

    Raises:
        OSError: The kernel refuses the filter.
    """
    instructions = [
        (_LOAD_NUMBER, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, action),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    kept = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(
        struct.pack("@HP", len(instructions), ctypes.addressof(kept))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    result: int = libc.syscall(_SECCOMP, _SET_FILTER, flags, program)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
