"""Negotiating FUSE INIT, the first request of the kernel, with changes to request and reply.

In the request the kernel offers features.  This module removes ``FUSE_ATOMIC_O_TRUNC``, because
libfuse selects it whenever it is offered.  With this feature the kernel sets the cached size of a
file to 0 when the file is opened with O_TRUNC.  But a disk keeps its size, and with the write-back
cache the kernel ignores the size that the server reports.  So the kernel would show an empty file,
and would fill the page around each small write with zeros.  Without the feature the kernel sends a
truncation after the open (`qedfuse.mount.fuse.truncation`).

This module also changes four values in libfuse's reply:

- ``max_background``: how many background requests, for which no process waits synchronously, may be
  in flight.  The default is 12: too few for a queue depth of 16, or for a long read-ahead.
- ``congestion_threshold``: the number of background requests in flight at which the kernel begins
  to treat the mount as congested.
- ``max_readahead``, which an unprivileged user cannot lower in ``/sys``
  (`qedfuse.mount.system.readahead`).
- ``time_gran``, the granularity of times.  With the write-back cache the kernel maintains the times
  of a file, and sends changed times before the next fsync(2), which costs a request.  With a coarse
  granularity the times change less often.

pyfuse3 has no interface for these changes.  So libfuse gets a socket in place of the device
until it has replied, and the request and the reply pass through this module.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack
from typing import Final

import pyfuse3
import trio

from qedfuse.errors import FuseError
from qedfuse.mount.system.privileges import FUSE_DEVICE
from qedfuse.util.backgroundtasks import background_tasks

# linux/fuse.h, a stable interface.  The structs are fuse_in_header, the first fields of
# fuse_init_in (major, minor, max_readahead, flags), fuse_out_header, and the first fields of
# fuse_init_out (the same four, max_background, congestion_threshold, max_write, time_gran).
_IN_HEADER: Final = struct.Struct("=IIQQIIII")
_INIT_IN: Final = struct.Struct("=IIII")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHII")
_FUSE_INIT: Final = 26
_ATOMIC_O_TRUNC: Final = 1 << 3
_MAX_MESSAGE_BYTES: Final = 1 << 20
"""Size of the buffer for the request and for the reply.  The kernel refuses a read(2) with a buffer
that is too small for the largest possible request."""

_MAX_BACKGROUND_REQUESTS_OF_ONE_DISK: Final = 64
"""Maximum number of background requests in flight for a mount of one disk.

With more, the requests of a program that makes few requests would wait longer behind those of
others.  Twice the number was not faster when it was measured."""
MAX_BACKGROUND_REQUESTS_OF_SEVERAL_DISKS: Final = 4096
"""Maximum number of background requests in flight for a mount of several disks.

The kernel counts the requests of all disks together.  If the requests to an image that does not
answer reached this number, all disks would wait.  The write-back of one disk can have some thousand
requests in flight."""

TIME_GRANULARITY_NS: Final = 100_000_000
"""The granularity of the times that the kernel maintains for a disk, in nanoseconds."""


def mask_request(message: bytes, unwanted: int) -> bytes:
    """Return the kernel's INIT request without some of the features that it offers.

    Args:
        message: The request.
        unwanted: The features to remove, as bits of ``flags``.

    Raises:
        FuseError: The message is not an INIT request.
    """
    min_bytes = _IN_HEADER.size + _INIT_IN.size
    if len(message) < min_bytes or _IN_HEADER.unpack_from(message)[1] != _FUSE_INIT:
        msg = f"{FUSE_DEVICE}: found a message of {len(message)} bytes, expected FUSE_INIT"
        raise FuseError(msg)
    changed = bytearray(message)
    *front, flags = _INIT_IN.unpack_from(message, _IN_HEADER.size)
    _INIT_IN.pack_into(changed, _IN_HEADER.size, *front, flags & ~unwanted)
    return bytes(changed)


def patch_reply(message: bytes, readahead: int | None, disks: int = 1) -> bytes:
    """Return libfuse's INIT reply with the values that this module changes.

    A reply that is too short for these values, such as an error, is returned unchanged.

    Args:
        message: The reply.
        readahead: Upper limit in bytes for the value of ``max_readahead`` in the reply; None for no
            limit.
        disks: Number of disks of the mount.
    """
    if len(message) < _OUT_HEADER.size + _INIT_OUT.size:
        return message
    changed = bytearray(message)
    fields = _INIT_OUT.unpack_from(message, _OUT_HEADER.size)
    major, minor, reply_readahead, flags, _, _, max_write, _ = fields
    background = (
        _MAX_BACKGROUND_REQUESTS_OF_ONE_DISK
        if disks == 1
        else MAX_BACKGROUND_REQUESTS_OF_SEVERAL_DISKS
    )
    max_readahead = reply_readahead if readahead is None else min(reply_readahead, readahead)
    congestion_threshold = background * 3 // 4  # the kernel's default is the same fraction
    _INIT_OUT.pack_into(
        changed,
        _OUT_HEADER.size,
        *(major, minor, max_readahead, flags),
        *(background, congestion_threshold, max_write, TIME_GRANULARITY_NS),
    )
    return bytes(changed)


async def negotiate_init(fd: int, readahead: int | None = None, disks: int = 1) -> None:
    """Let libfuse negotiate FUSE INIT, and change the request and the reply on their way.

    Call this after `pyfuse3.init`, and before the `pyfuse3.main` that serves the mount.  As soon as
    the kernel has the reply, it accepts system calls on the mount.

    Args:
        fd: The descriptor of libfuse's connection to the kernel.
        readahead: Maximum read-ahead in bytes, as for `patch_reply`.
        disks: Number of disks of the mount.

    Raises:
        FuseError: The first request is not an INIT request, a message cannot be passed on, or no
            descriptor is free.  The mount cannot be used.
    """
    try:
        with ExitStack() as stack:
            device = os.dup(fd)
            stack.callback(os.close, device)
            proxy_end, libfuse_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(proxy_end)
            stack.enter_context(libfuse_end)
            stack.callback(os.dup2, device, fd, inheritable=False)
            await trio.lowlevel.wait_readable(device)
            request = mask_request(os.read(device, _MAX_MESSAGE_BYTES), _ATOMIC_O_TRUNC)
            os.dup2(libfuse_end.fileno(), fd, inheritable=False)
            proxy_end.setblocking(False)  # noqa: FBT003
            proxy_end.send(request)
            async with background_tasks() as nursery:
                # It handles only this request.
                nursery.start_soon(pyfuse3.main)
                await trio.lowlevel.wait_readable(proxy_end)
                # libfuse has replied.  The tasks of pyfuse3 now wait for the socket.  They must end
                # before ``fd`` becomes the device again.  Otherwise the event loop would still wait
                # for the socket.
                nursery.cancel_scope.cancel()
            os.write(device, patch_reply(proxy_end.recv(_MAX_MESSAGE_BYTES), readahead, disks))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = f"{FUSE_DEVICE}: cannot negotiate FUSE_INIT with the kernel: {reason}"
        raise FuseError(msg) from error
