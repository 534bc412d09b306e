"""System calls on files, as functions that may block.

On failure all of them raise `OSError`, except those that examine the type of the file system.
Most of them call the C library, because Python lacks the call or a part of its result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import Buffer

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 3
"""Flags of fallocate(2); the kernel accepts PUNCH_HOLE (2) only together with KEEP_SIZE."""

SYNC_START: Final = 2
"""SYNC_FILE_RANGE_WRITE: start to write the dirty pages of a range to the disk."""
SYNC_AND_WAIT: Final = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER: write a range, and wait for the disk."""

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_SIZE_AND_BLOCKS: Final = 0x600
_STATX: Final = struct.Struct("=40xQQ200x")
"""Flags of statx(2), and where its result has the length and the blocks of a file."""

_SERVER_MAGICS: Final = frozenset(
    {
        0x65735546,  # FUSE, virtiofs included
        0x6969,  # NFS
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB2
        0x01021997,  # 9P
        0x00C36400,  # Ceph
        0x5346414F,  # AFS
        0x6B414653,  # AFS of the kernel
        0x73757245,  # Coda
        0x0BD00BD0,  # Lustre
    }
)
"""The ``f_type`` of file systems that send requests to a server (linux/magic.h)."""
_MEMORY_MAGICS: Final = frozenset({0x01021994, 0x858458F6})
"""The ``f_type`` of tmpfs and ramfs, whose files are in memory only."""
_FAT_MAGICS: Final = frozenset({0x4D44, 0x2011BAB0})
"""The ``f_type`` of FAT and exFAT, which do not store inode numbers."""
_STATFS_BYTES: Final = 256
"""Length of the buffer for struct statfs, more than needed; the first field is ``f_type``."""

_MAX_PARTS: Final = 1024
"""Maximum number of buffers in one call of pwritev(2) (IOV_MAX)."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = getattr(_libc, "fallocate64", None) or _libc.fallocate  # musl has one name only
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range: Final = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


_fstatfs: Final = getattr(_libc, "fstatfs64", None) or _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_statx: Final = getattr(_libc, "statx", None)
if _statx is not None:
    _statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def size_and_blocks(fd: int) -> tuple[int, int]:
    """Return the length in bytes, and the ``st_blocks`` in units of 512 bytes, of an open file.

    statx(2) reads them without the times, and without a request to a server on a network.

    Reading the times would make later writes slower.  Normally a write sets the time of the last
    tick of the kernel's clock, so most writes leave the times of the file unchanged.  But since
    Linux 6.13, the first write after the times were read sets the exact time.  So if each flush
    read the times of an image, the write after each flush would change them.  For the guest's files
    on a loop device each such change is one more block to write and to flush.

    Raises:
        OSError: A system call failed.
    """
    result = ctypes.create_string_buffer(_STATX.size)
    if _statx is not None and not _statx(
        fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_SIZE_AND_BLOCKS, result
    ):
        size, blocks = _STATX.unpack(result.raw)
        return size, blocks
    status = os.fstat(fd)  # an old C library, or a sandbox that does not know statx(2)
    return status.st_size, status.st_blocks


def waits_for_server(fd: int) -> bool:
    """Return whether a call on an open file may wait for a server (FUSE, NFS) without a time limit.

    Returns True also if fstatfs(2) fails, which happens only if it asks a server.
    """
    magic = _file_system_magic(fd)
    return magic is None or magic in _SERVER_MAGICS


def inline_flags(fd: int) -> int:
    """Return the flags of preadv2(2) with which the event loop reads an open file without waiting.

    With RWF_NOWAIT a read fails if it would wait for a disk.  tmpfs refuses the flag (EOPNOTSUPP),
    and the files of tmpfs and ramfs are in memory, so the result for both is 0.
    """
    return 0 if _file_system_magic(fd) in _MEMORY_MAGICS else os.RWF_NOWAIT


def keeps_inode_numbers(fd: int) -> bool:
    """Return whether a file keeps its inode number while no program has it open."""
    magic = _file_system_magic(fd)
    return magic is not None and magic not in _FAT_MAGICS


def _file_system_magic(fd: int) -> int | None:
    """Return the ``f_type`` of the file system of an open file; None if fstatfs(2) fails."""
    result = ctypes.create_string_buffer(_STATFS_BYTES)
    if _fstatfs(fd, result):
        return None
    return int.from_bytes(result.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how a range of a file is stored (fallocate(2)), without holding the GIL.

    Raises:
        OSError: The kernel refused.
    """
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """Write a range of a file from the page cache to the disk (sync_file_range(2)).

    ``flags`` is `SYNC_START` or `SYNC_AND_WAIT`.  Neither makes anything durable.

    Raises:
        OSError: The kernel refused, or an earlier write of these pages has failed.
    """
    if _sync_file_range(fd, offset, length, flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fsync_path(path: str) -> None:
    """Make the file or the directory ``path`` durable (fsync(2)).

    Raises:
        OSError: The file cannot be opened, or a system call failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_all(fd: int, offset: int, view: memoryview) -> int:
    """Fill ``view`` from a file offset; return how many bytes were read.

    The result is less than the length of the view only if the file ends earlier.
    """
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        if not count:
            break
        done += count
    return done


def write_all(fd: int, offset: int, parts: tuple[Buffer, ...]) -> float:
    """Write ``parts`` one after another, beginning at a file offset; return the seconds it took."""
    since = time.perf_counter()
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        count = os.pwritev(fd, left[:_MAX_PARTS], offset)
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left and count:
            left[0] = left[0][count:]
    return time.perf_counter() - since
