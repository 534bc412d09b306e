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
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ForeignError, HostError
from qedfuse.foreign.confined import find_program, spawn_confined

if TYPE_CHECKING:
    from qedfuse.foreign.graph import ChainImage, Graph

_PROGRAM: Final = "qemu-img"
_MAX_CPU_SECONDS: Final = 30
"""Maximum processor time of the program."""
_MAX_SECONDS: Final = 30.0
"""Maximum time in seconds until the program has printed everything."""
_END_SECONDS: Final = 5.0
"""Maximum time in seconds until the program has ended, after it has printed everything."""
_MAX_OUTPUT_BYTES: Final = 16 << 20
"""Maximum length of the output: an image can have many snapshots, and QEMU describes each."""
_CHUNK_BYTES: Final = 1 << 16
_MAX_DISK_BYTES: Final = (1 << 63) - 1


def virtual_size(graph: Graph, image: ChainImage) -> int:
    """Return the size in bytes of the disk of an image of a graph; the call blocks.

    Raises:
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
            with process:
                try:
                    text = _read_all(output.fileno(), name)
                    status = process.wait(_END_SECONDS)
                finally:
                    process.kill()
    except OSError as error:
        raise HostError.from_os(error, name, f"cannot run {_PROGRAM}") from error
    except subprocess.TimeoutExpired as error:
        msg = f"{name}: {_PROGRAM}: found no end after its output, expected one"
        raise ForeignError(msg) from error
    if status:
        msg = f"{name}: {_PROGRAM}: found exit status {status}, expected 0"
        raise ForeignError(msg)
    return _size_in(text, name)


def _read_all(output: int, name: str) -> bytes:
    """Return all that the program prints to the descriptor ``output``.

    Raises:
        ForeignError: The output is too long, or does not end in time.
        OSError: A system call failed.
    """
    end = time.monotonic() + _MAX_SECONDS
    poll = select.poll()
    poll.register(output, select.POLLIN)
    text = bytearray()
    while len(text) <= _MAX_OUTPUT_BYTES:
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            msg = f"{name}: {_PROGRAM}: found no end for {_MAX_SECONDS:.0f} s, expected one"
            raise ForeignError(msg)
        part = os.read(output, _CHUNK_BYTES)
        if not part:
            return bytes(text)
        text += part
    msg = f"{name}: {_PROGRAM}: found more than {_MAX_OUTPUT_BYTES} bytes of output, expected fewer"
    raise ForeignError(msg)


def _size_in(text: bytes, name: str) -> int:
    """Return the size that the program has printed.

    Raises:
        ForeignError: The output has no size, or one that no disk has.
    """
    try:
        size = json.loads(text)["virtual-size"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        msg = f"{name}: {_PROGRAM}: found output without a size, expected one: {error!r}"
        raise ForeignError(msg) from error
    if type(size) is not int or not 0 <= size <= _MAX_DISK_BYTES:
        msg = f"{name}: {_PROGRAM}: found a size that no disk has"
        raise ForeignError(msg)
    return size
