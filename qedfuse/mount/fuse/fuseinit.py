"""FUSE INIT, the first request of the kernel, with its request masked and its reply patched.

In the request the kernel offers features; libfuse selects from them, and selects
``FUSE_ATOMIC_O_TRUNC`` whenever it is offered.  With that feature the kernel sets the size of
a file to 0 by itself when the file is opened with O_TRUNC.  A disk cannot be truncated to
nothing, but with the write-back cache the kernel ignores sizes that the server reports: it
would see an empty file, and worse, it would fill the page around each small write with zeros.
Without that feature the kernel sends a truncation after the open, which can be refused
(`qedfuse.mount.fuse.truncation`), and takes the size from the reply.

The reply of libfuse lacks three values:

- ``max_background``.  The kernel sends reads and writes for which no process waits
  synchronously (read-ahead, write-back, asynchronous O_DIRECT) as background requests.  Unless
  the reply says otherwise, 12 of them are in flight at most: then a program with a queue depth
  of 16 gets 12, and long read-ahead is cut short.  The kernel accepts the value from an
  unprivileged user too, up to a limit of its own.
- ``max_readahead``.  The kernel reads ahead at most as far as the reply says.  An unprivileged
  user, who cannot write to ``/sys`` (`qedfuse.mount.system.readahead`), can lower it in no
  other way.
- ``time_gran``.  With the write-back cache the kernel maintains the times of a file, and sends
  them before each fsync(2) that follows a change of them; so they change in coarse steps.

pyfuse3 has no interface for any of this.  So while FUSE INIT is negotiated, libfuse gets a
socket in place of the device, and the request and the reply pass through this module.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Final

import pyfuse3
import trio

from qedfuse.errors import FuseError
from qedfuse.mount.system.privileges import FUSE_DEVICE
from qedfuse.util.backgroundtasks import background_tasks
from qedfuse.util.descriptors import open_descriptors

# linux/fuse.h, a stable interface: struct fuse_in_header (40 bytes) and the first fields of
# struct fuse_init_in (major, minor, max_readahead, flags); struct fuse_out_header (16 bytes)
# and the same fields of struct fuse_init_out, followed by max_background,
# congestion_threshold, max_write and time_gran.
_IN_HEADER: Final = struct.Struct("=IIQQIIII")
_INIT_IN: Final = struct.Struct("=IIII")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHII")
_FUSE_INIT: Final = 26
_ATOMIC_O_TRUNC: Final = 1 << 3
_MAX_MESSAGE_BYTES: Final = 1 << 20
"""More than the size of libfuse's buffer; the kernel refuses a read(2) with a smaller one."""

MAX_BACKGROUND: Final = 64
"""Background requests that the kernel may have in flight.  A program with few requests waits
behind all of them, and twice as many gain nothing."""
_CONGESTION_THRESHOLD: Final = MAX_BACKGROUND * 3 // 4
"""The same proportion as the kernel's default."""

TIME_GRANULARITY_NS: Final = 100_000_000
"""The granularity of a disk's times in the kernel."""


def fuse_descriptors() -> set[int]:
    """Return the descriptors of this process that are connections to the kernel's FUSE."""
    found = set()
    for number in open_descriptors():
        with suppress(OSError):  # a thread has closed it meanwhile
            if os.readlink(f"/proc/self/fd/{number}") == FUSE_DEVICE:  # noqa: PTH115
                found.add(number)
    return found


def mask_request(message: bytes, unwanted: int) -> bytes:
    """Return the kernel's INIT request without the features in ``unwanted``.

    Raises:
        FuseError: The message is no INIT request.
    """
    min_bytes = _IN_HEADER.size + _INIT_IN.size
    if len(message) < min_bytes or _IN_HEADER.unpack_from(message)[1] != _FUSE_INIT:
        msg = f"{FUSE_DEVICE}: found a message of {len(message)} bytes, expected FUSE_INIT"
        raise FuseError(msg)
    changed = bytearray(message)
    *front, flags = _INIT_IN.unpack_from(message, _IN_HEADER.size)
    _INIT_IN.pack_into(changed, _IN_HEADER.size, *front, flags & ~unwanted)
    return bytes(changed)


def patch_reply(message: bytes, readahead: int | None) -> bytes:
    """Return libfuse's INIT reply with the values that it lacks; an error reply unchanged.

    Args:
        message: The reply.
        readahead: The longest read-ahead in bytes; None for what the kernel offers.
    """
    if len(message) < _OUT_HEADER.size + _INIT_OUT.size:
        return message
    changed = bytearray(message)
    fields = _INIT_OUT.unpack_from(message, _OUT_HEADER.size)
    major, minor, offered, flags, _, _, max_write, _ = fields
    _INIT_OUT.pack_into(
        changed,
        _OUT_HEADER.size,
        *(major, minor, offered if readahead is None else min(offered, readahead), flags),
        *(MAX_BACKGROUND, _CONGESTION_THRESHOLD, max_write, TIME_GRANULARITY_NS),
    )
    return bytes(changed)


async def negotiate_init(fd: int, readahead: int | None = None) -> None:
    """Let libfuse, whose connection to the kernel is ``fd``, negotiate FUSE INIT.

    Call it between `pyfuse3.init` and `pyfuse3.main`.  When it returns, the kernel accepts
    system calls on the mount.

    Args:
        fd: The connection.
        readahead: The longest read-ahead in bytes; None for what the kernel offers.

    Raises:
        FuseError: The kernel or libfuse has refused.
    """
    device = os.dup(fd)
    proxy_end, libfuse_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await trio.lowlevel.wait_readable(device)
        request = mask_request(os.read(device, _MAX_MESSAGE_BYTES), _ATOMIC_O_TRUNC)
        os.dup2(libfuse_end.fileno(), fd, inheritable=False)
        proxy_end.setblocking(False)  # noqa: FBT003
        proxy_end.send(request)
        async with background_tasks() as nursery:
            nursery.start_soon(pyfuse3.main)
            await trio.lowlevel.wait_readable(proxy_end)
            # The tasks that wait for the socket have to end before ``fd`` is the device again.
            nursery.cancel_scope.cancel()
        os.write(device, patch_reply(proxy_end.recv(_MAX_MESSAGE_BYTES), readahead))
    except OSError as error:
        msg = f"{FUSE_DEVICE}: cannot agree with the kernel: {os.strerror(error.errno or 0)}"
        raise FuseError(msg) from error
    finally:
        os.dup2(device, fd, inheritable=False)
        os.close(device)
        proxy_end.close()
        libfuse_end.close()
