"""Pipes as the source or the target of a copy: opened so that waiting for them can be ended."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.errors import HostError, UsageError, cannot_open
from qedfuse.tools.probing import judge_start
from qedfuse.tools.targets import NewTarget, complete, write_all
from qedfuse.tools.units import judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.tools.targets import Target

    Progress = Callable[[int, int], None]

_STANDARD: Final = {os.O_RDONLY: 0, os.O_WRONLY: 1}
_NAMES: Final = {os.O_RDONLY: "standard input", os.O_WRONLY: "standard output"}


def is_stream(path: str) -> bool:
    """Tell whether a name stands for a pipe: ``-``, a FIFO, or /dev/stdin of that kind."""
    if path == "-":
        return True
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def open_stream(path: str, access: int) -> tuple[int, str]:
    """Open a pipe; give the file and what it is called in messages.

    Raises:
        HostError: It cannot be opened.
    """
    if path != "-":
        try:
            # Waits for the other end, as every program does that opens a FIFO; but not
            # longer than the user does.
            fd = await trio.to_thread.run_sync(
                os.open, path, access | os.O_CLOEXEC, abandon_on_cancel=True
            )
        except OSError as error:
            raise cannot_open(path, error) from error
        os.set_blocking(fd, False)
        return fd, path
    fd = _STANDARD[access]
    try:
        # Others have the same pipe open, who do not expect it to refuse to wait.
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | os.O_NONBLOCK), _NAMES[access]
    except OSError:
        return os.dup(fd), _NAMES[access]


async def _read(descriptor: int, view: memoryview, name: str) -> int:
    """Fill a buffer from a pipe; return how many bytes there were before its end."""
    done = 0
    while done < len(view):
        try:
            count = os.readv(descriptor, [view[done:]])
        except BlockingIOError:
            await trio.lowlevel.wait_readable(descriptor)
            continue
        except OSError as error:
            raise HostError.from_os(error, name, "read") from error
        await trio.lowlevel.checkpoint()
        if not count:
            break
        done += count
    return done


async def copy_stream(
    descriptor: int,
    name: str,
    target: Target,
    *,
    sparse_size: int,
    raw: bool,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Copy a raw stream to its end.

    Args:
        descriptor: The pipe.
        name: What it is called in messages.
        target: Where to.
        sparse_size: As for `Copy`.
        raw: Take the bytes as they are, even if they look like an image.
        progress: Called with the bytes that came, twice: nobody knows how many there are.

    Returns:
        The bytes of the disk, and those that were written as data.

    Raises:
        UsageError: The stream is an image.
        HostError: The host refused.
    """
    buffer = np.empty(max(target.longest, target.unit), np.uint8)
    size = data_bytes = 0
    while True:
        count = await _read(descriptor, buffer.data, name)
        if not size and not raw and judge_start(buffer[:count].data, name) != "raw":
            msg = f"{name}: found a QED image, expected raw content: an image needs a file"
            raise UsageError(msg)
        if count:
            content = buffer[:count]
            data, hide = await trio.to_thread.run_sync(judge, content, target.unit, sparse_size)
            if isinstance(target, NewTarget):
                writes = target.place(size, content.data, data, hide)
                await trio.to_thread.run_sync(write_all, target.descriptor, writes, target.name)
            else:
                await target.take(size, content.data, data)
            size += count
            data_bytes += int(data.sum()) * target.unit
            if progress is not None:
                progress(size, size)
        if count < len(buffer):
            await complete(target, size)
            return size, data_bytes
