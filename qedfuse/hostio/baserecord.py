"""Storing a record with an image: the versions of the bases over which the image was made.

The record is an extended attribute of the image.  If the file system has no place for it, a hidden
file beside the image holds the record, and the inode number of the image.  If the number differs
from that of the present image, the record belongs to an earlier image of the same name, and is
ignored.  On a file system that keeps no inode numbers (FAT) the number is 0.

Another file could have the name of the hidden file.  So a file with this name is replaced or
removed only if its magic and its checksum show that it is a record.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from contextlib import suppress
from typing import Final

from qedfuse.errors import HostError
from qedfuse.hostio.newfile import CONTENT_ATTRIBUTE_PREFIX, NewFile
from qedfuse.hostio.systemcalls import keeps_inode_numbers, write_all
from qedfuse.text import printable

_ATTRIBUTE: Final = CONTENT_ATTRIBUTE_PREFIX + "base"
_NO_ATTRIBUTE: Final = (errno.ENOTSUP, errno.ENODATA, errno.ENOSYS)
"""Errors of getxattr(2) if the file or its file system has no such attribute."""
_CANNOT_HOLD: Final = (
    *(errno.ENOTSUP, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE),
)
"""Errors of setxattr(2) if the file system has no place for the attribute."""

_SUFFIX: Final = ".qedfuse-base"
_MAX_NAME_BYTES: Final = 255
_MAGIC: Final = b"qedfuse: the version of the base of an image\n"
_MAX_FILE_BYTES: Final = 64 << 10


def read_record(fd: int, path: str) -> bytes | None:
    """Return the record of the open image ``fd`` at ``path``; None if there is none.

    Raises:
        OSError: The record cannot be read.
    """
    try:
        return os.getxattr(fd, _ATTRIBUTE)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTE:
            raise
    file = _open_file(record_path(path))
    if file < 0:
        return None
    try:
        found = _parse(file)
    finally:
        os.close(file)
    return found[1] if found is not None and found[0] == _inode(fd) else None


def set_attribute(fd: int, record: bytes) -> bool:
    """Store the record of an image as an attribute; return False if there is no place for it.

    If there is no place, an older attribute is removed, if the host permits.

    Raises:
        OSError: The host refused for another reason.
    """
    try:
        os.setxattr(fd, _ATTRIBUTE, record)
    except OSError as error:
        if error.errno not in _CANNOT_HOLD:
            raise
        with suppress(OSError):
            os.removexattr(fd, _ATTRIBUTE)
        return False
    return True


def write_record_file(fd: int, path: str, record: bytes) -> None:
    """Store the record of an image in a file beside the image, durably.

    Raises:
        OSError: A system call failed.
        QedError: The new file cannot be made, or another file has the name of the image or record.
    """
    target, status = record_path(path), os.fstat(fd)
    if not os.path.samestat(os.stat(os.path.realpath(path)), status):  # noqa: PTH116  str paths
        msg = f"{printable(path)}: found another file than the open image"
        raise HostError(msg, errno.ESTALE)
    content = b"%x\n" % _inode(fd) + record
    content = _MAGIC + b"%08x\n" % zlib.crc32(content) + content
    old = _open_file(target)
    try:
        if old >= 0 and _parse(old) is None:
            msg = f"{printable(target)}: found another file, expected none, or a record of qedfuse"
            raise HostError(msg, errno.EEXIST)
        with NewFile(
            target, mode=status.st_mode & 0o666, old=None if old < 0 else old, overwrite=True
        ) as new:
            file = os.open(new.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                write_all(file, 0, (content,))
            finally:
                os.close(file)
            new.commit()
    finally:
        if old >= 0:
            os.close(old)


def remove_record(fd: int, path: str) -> None:
    """Remove the record of an image, and the record file of an earlier image of the same name.

    Errors are ignored: a record that is left here is not used for a base of another name, and
    leads to a message if it has another version of the base.
    """
    with suppress(OSError):
        os.removexattr(fd, _ATTRIBUTE)
    remove_record_file(path)


def remove_record_file(path: str) -> None:
    """Remove the file with the record of the image ``path``, if it is a record; ignore errors."""
    with suppress(OSError):
        target = record_path(path)
        file = _open_file(target)
        if file < 0:
            return
        try:
            is_same = os.path.samestat(os.lstat(target), os.fstat(file))
            if is_same and _parse(file) is not None:
                os.unlink(target)  # noqa: PTH108  str paths
        finally:
            os.close(file)


def record_path(path: str) -> str:
    """Return the path of the file that can hold the record of an image; a long name is cut."""
    directory, name = os.path.split(os.path.realpath(path))
    raw = os.fsencode(name)
    max_raw_bytes = _MAX_NAME_BYTES - len(_SUFFIX) - 1
    if len(raw) > max_raw_bytes:
        raw = raw[: max_raw_bytes - 9] + b".%08x" % zlib.crc32(raw)
    return os.path.join(directory, f".{os.fsdecode(raw)}{_SUFFIX}")  # noqa: PTH118  str paths


def _open_file(path: str) -> int:
    """Open the file of a record; return its descriptor, or -1 if there is no file.

    A symbolic link is not followed, and the open of a FIFO does not wait.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return -1


def _parse(file: int) -> tuple[int, bytes] | None:
    """Return the inode number and the record in an open file; None without a valid record."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= _MAX_FILE_BYTES:
        return None
    content = os.pread(file, _MAX_FILE_BYTES, 0)
    if not content.startswith(_MAGIC):
        return None
    checksum, _, rest = content.removeprefix(_MAGIC).partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(rest):
        return None
    inode, _, record = rest.partition(b"\n")
    try:
        return int(inode, 16), record
    except ValueError:
        return None


def _inode(fd: int) -> int:
    """Return the inode number of an open image; 0 if its file system keeps no inode numbers."""
    return os.fstat(fd).st_ino if keeps_inode_numbers(fd) else 0
