"""The first words with the kernel, with some of them changed on the way.

The kernel opens the conversation by telling what it can do; libfuse picks from that, and
asks for ``FUSE_ATOMIC_O_TRUNC`` wherever it is offered.  With it, opening a file with
O_TRUNC makes the kernel set the file's size to 0 on its own.  A disk cannot be cut to
nothing, but with the write-back cache the kernel does not believe sizes from us any more:
it would see an empty file, and worse, it would fill up with zeros the page around each
small write.  Without that feature the kernel sends a truncation after the open, which can
be refused (`qedfuse.mount.fuse.truncation`), and takes the size in our answer.

The answer lacks three figures.  The kernel sends reads and writes that nobody waits for
in person (read-ahead, write-back, asynchronous O_DIRECT) in the background, and has 12 of
them under way unless the answer says another number: then a program with 16 in flight has
12, and long read-ahead is cut short.  It takes the number from an ordinary user too, up
to a limit of its own.  And it reads ahead no further than the answer says, which is the
way to less of it for those who cannot write to ``/sys`` (`qedfuse.mount.system.readahead`).  With
the write-back cache it keeps a file's times itself, and sends them before each fsync(2)
that follows a change of theirs; so they change in coarse steps.

pyfuse3 has no way to say any of this.  So libfuse gets a socket in place of the device
for the length of the handshake, and the two messages pass through here.
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
from qedfuse.util.descriptors import open_descriptors
from qedfuse.util.scope import open_scope

# struct fuse_in_header (40 bytes) and the first fields of struct fuse_init_in: major,
# minor, max_readahead, flags; struct fuse_out_header (16 bytes), and the same fields of
# struct fuse_init_out with some more: max_background, congestion_threshold, max_write and
# time_gran.  They are part of the kernel's stable interface.
_IN_HEADER: Final = struct.Struct("=IIQQIIII")
_INIT_IN: Final = struct.Struct("=IIII")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHII")
_FUSE_INIT: Final = 26
_ATOMIC_O_TRUNC: Final = 1 << 3
_MAX_MESSAGE: Final = 1 << 20
"""More than libfuse's own buffer; the kernel refuses to fill a smaller one."""

MAX_BACKGROUND: Final = 64
"""Requests that the kernel may have under way in the background.  Twice as many gain
nothing, and who waits for one request would wait behind all of them."""

TIME_STEP: Final = 100_000_000
"""Steps in which the kernel counts the times of a disk, in nanoseconds."""


def fuse_descriptors() -> set[int]:
    """List the descriptors of this process that are connections to the kernel's FUSE."""
    found = set()
    for number in open_descriptors():
        with suppress(OSError):  # a thread has closed it meanwhile
            if os.readlink(f"/proc/self/fd/{number}") == FUSE_DEVICE:  # noqa: PTH115
                found.add(number)
    return found


def mask_request(message: bytes, unwanted: int) -> bytes:
    """Take features out of what the kernel offers in its first message.

    Raises:
        FuseError: It is not the kernel's first message.
    """
    least = _IN_HEADER.size + _INIT_IN.size
    if len(message) < least or _IN_HEADER.unpack_from(message)[1] != _FUSE_INIT:
        msg = f"{FUSE_DEVICE}: found a message of {len(message)} bytes, expected FUSE_INIT"
        raise FuseError(msg)
    changed = bytearray(message)
    *front, flags = _INIT_IN.unpack_from(message, _IN_HEADER.size)
    _INIT_IN.pack_into(changed, _IN_HEADER.size, *front, flags & ~unwanted)
    return bytes(changed)


def patch_reply(message: bytes, readahead: int | None) -> bytes:
    """Put into libfuse's answer what it leaves out; an answer that refuses stays as it is.

    Args:
        message: The answer.
        readahead: Bytes that the kernel may read ahead at most; None for what it offers.
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
        *(MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4),  # the kernel's own proportion
        *(max_write, TIME_STEP),
    )
    return bytes(changed)


async def shake_hands(fd: int, readahead: int | None = None) -> None:
    """Let libfuse, whose connection to the kernel is ``fd``, agree with the kernel.

    Call it between `pyfuse3.init` and `pyfuse3.main`.  When it returns, the kernel
    serves requests for the mount, and reads ahead at most ``readahead`` bytes, or as far
    as it likes with None.

    Raises:
        FuseError: The kernel or libfuse does not want to go on.
    """
    device = os.dup(fd)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await trio.lowlevel.wait_readable(device)
        offer = mask_request(os.read(device, _MAX_MESSAGE), _ATOMIC_O_TRUNC)
        os.dup2(theirs.fileno(), fd, inheritable=False)
        ours.setblocking(False)  # noqa: FBT003
        ours.send(offer)
        async with open_scope() as nursery:
            nursery.start_soon(pyfuse3.main)
            await trio.lowlevel.wait_readable(ours)
            # The tasks that wait on the socket have to go before the device comes back.
            nursery.cancel_scope.cancel()
        os.write(device, patch_reply(ours.recv(_MAX_MESSAGE), readahead))
    except OSError as error:
        msg = f"{FUSE_DEVICE}: cannot agree with the kernel: {os.strerror(error.errno or 0)}"
        raise FuseError(msg) from error
    finally:
        os.dup2(device, fd, inheritable=False)
        os.close(device)
        ours.close()
        theirs.close()
