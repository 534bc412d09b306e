"""Asking QEMU for the virtual size of one image of a chain.

``qemu-img info`` runs in a sandbox like that of qemu-nbd.  The command line names the image without
its base, so qemu-img opens only the files of this image.  The output is not trusted: a size that no
disk has is refused.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import ForeignError, HostError
from qedfuse.foreign.confined import end_process, find_program, spawn_confined
from qedfuse.util.exitstatus import describe_exit

if TYPE_CHECKING:
    from qedfuse.foreign.graph import ChainImage, Graph

_PROGRAM: Final = "qemu-img"
_MAX_CPU_SECONDS: Final = 30
"""Maximum processor time of the program."""
_MAX_SECONDS: Final = 30.0
"""Maximum time in seconds until the program has printed everything."""
_END_SECONDS: Final = 5.0
"""Maximum time in seconds until the program has ended, after it has printed everything."""
_CANCEL_CHECK_SECONDS: Final = 0.2
"""Maximum time after which a cancellation of the task, as by Ctrl-C, is noticed."""
_MAX_OUTPUT_BYTES: Final = 16 << 20
"""Maximum length of the output: an image can have many snapshots, and QEMU describes each."""
_CHUNK_BYTES: Final = 1 << 16
_MAX_DISK_BYTES: Final = (1 << 63) - 1


def virtual_size(graph: Graph, image: ChainImage) -> int:
    """Return the size in bytes of the disk of ``image``, one of the images of a graph (`Graph`).

    The call blocks.  The caller is a worker thread of trio.  If its task is cancelled, the program
    is killed.

    Raises:
        Cancelled: The task was cancelled.
        ForeignError: The program is not installed, fails, does not end, or prints no size.
        HostError: A system call failed.
    """
    name = image.file.name
    options = "json:" + json.dumps(image.options)
    command = [find_program(_PROGRAM, name), "info", "--output=json", options]
    try:
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb", buffering=0) as output:
            try:
                process = spawn_confined(
                    *(command, graph, write_end, subprocess.DEVNULL), cpu_seconds=_MAX_CPU_SECONDS
                )
            finally:
                os.close(write_end)
            try:
                text = _read_all(output.fileno(), name)
                status = _wait_end(process, name)
            finally:
                end_process(process)
    except OSError as error:
        raise HostError.from_os(error, name, f"cannot run {_PROGRAM}") from error
    if status:
        msg = f"{name}: {_PROGRAM}: {describe_exit(status)}"
        raise ForeignError(msg)
    return _size_in(text, name)


def _read_all(output: int, name: str) -> bytes:
    """Return all that the program prints to the descriptor ``output``.

    Raises:
        Cancelled: The task was cancelled.
        ForeignError: The output is too long, or does not end in time.
        OSError: A system call failed.
    """
    end = time.monotonic() + _MAX_SECONDS
    poll = select.poll()
    poll.register(output, select.POLLIN)
    text = bytearray()
    while len(text) <= _MAX_OUTPUT_BYTES:
        trio.from_thread.check_cancelled()
        left = end - time.monotonic()
        if left <= 0:
            msg = f"{name}: {_PROGRAM}: found no end for {_MAX_SECONDS:.0f} s, expected one"
            raise ForeignError(msg)
        if not poll.poll(min(left, _CANCEL_CHECK_SECONDS) * 1000):
            continue
        part = os.read(output, _CHUNK_BYTES)
        if not part:
            return bytes(text)
        text += part
    msg = f"{name}: {_PROGRAM}: found more than {_MAX_OUTPUT_BYTES} bytes of output, expected fewer"
    raise ForeignError(msg)


def _wait_end(process: subprocess.Popen[bytes], name: str) -> int:
    """Wait for the end of the program; return its exit status.

    Raises:
        Cancelled: The task was cancelled.
        ForeignError: The program does not end in time.
    """
    end = time.monotonic() + _END_SECONDS
    while (left := end - time.monotonic()) > 0:
        trio.from_thread.check_cancelled()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, _CANCEL_CHECK_SECONDS))
    msg = f"{name}: {_PROGRAM}: found no end after its output, expected one"
    raise ForeignError(msg)


def _size_in(text: bytes, name: str) -> int:
    """Return the size that the program has printed.

    Raises:
        ForeignError: The output has no size, or one that no disk has.
    """
    try:
        size = json.loads(text)["virtual-size"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        # Not the text of the error: it can contain the whole output.
        msg = (
            f"{name}: {_PROGRAM}: found output without a size, expected one "
            f"({type(error).__name__})"
        )
        raise ForeignError(msg) from error
    if type(size) is not int or not 0 <= size <= _MAX_DISK_BYTES:
        msg = f"{name}: {_PROGRAM}: found a size that no disk has"
        raise ForeignError(msg)
    return size
