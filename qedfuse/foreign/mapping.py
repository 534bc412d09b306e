"""Finding out from QEMU where the files of a chain have the bytes of the disk.

``qemu-img map`` runs in a sandbox like that of qemu-nbd, and prints one JSON object per line.  The
output is not trusted.  But false output gains nothing for a hostile image that takes over the
program: such output can only name other ranges of the files of the image's own chain.  An image
that took over qemu-nbd could read the same ranges without the map.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from qedfuse.errors import ForeignError
from qedfuse.foreign.confined import find_program, spawn_confined
from qedfuse.foreign.runmap import MAX_RUN_OFFSET, UNKNOWN, ZEROS
from qedfuse.text import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.foreign.graph import Graph
    from qedfuse.foreign.runmap import RunMap

_PROGRAM: Final = "qemu-img"
_MAX_CPU_SECONDS: Final = 60
"""Maximum processor time of the program."""
_CHUNK_BYTES: Final = 1 << 16
"""Maximum number of bytes that one call reads, and about the maximum length of a line."""
_MAX_SHOWN: Final = 100
"""Maximum number of characters of the output that a message shows."""


def start_mapping(graph: Graph, name: str, output: int) -> subprocess.Popen[bytes]:
    """Start ``qemu-img map``, which prints to the descriptor ``output``.

    The caller must wait for the end of the returned process.  The kernel kills it when the calling
    thread ends.

    Raises:
        ForeignError: The program is not installed.
        OSError: A system call failed.
    """
    options = "json:" + json.dumps(graph.options)
    command = [find_program(_PROGRAM, name), "map", "--output=json", options]
    return spawn_confined(
        *(command, graph, output, subprocess.DEVNULL), cpu_seconds=_MAX_CPU_SECONDS
    )


def fill_map(run_map: RunMap, output: BinaryIO, files: Sequence[tuple[int, int] | None]) -> None:
    """Add the ranges in the program's output to a map, until the output ends or the map is full.

    Args:
        run_map: The map, which must be empty.
        output: The program's output.
        files: For each image of the chain, from the top one down: the file that has its data, as
            its number in the map and its length in bytes.  None if only QEMU can read the data.

    Raises:
        ForeignError: The output is not a map of a disk.
        OSError: A system call failed.
    """
    try:
        for found in _objects(output):
            start, length = found["start"], found["length"]
            if start != run_map.end or not 0 < length <= MAX_RUN_OFFSET - start:
                # JSON can have anything here, of any length.
                shown = shortened(repr(start), _MAX_SHOWN)
                msg = f"{_PROGRAM}: found a range at {shown}, expected one at {run_map.end}"
                raise ForeignError(msg)
            if not _add(run_map, found, files):
                return
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        # Not the text of the error: it can contain all that was read.
        msg = f"{_PROGRAM}: found output that is not a map ({type(error).__name__})"
        raise ForeignError(msg) from error


def _objects(output: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the objects of the program's output; raise ValueError for other output.

    A last line without a newline is ignored: the program has ended while it wrote the line.
    """
    rest = b""
    while data := output.read(_CHUNK_BYTES):
        lines, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            # The output is an array: brackets at its ends, and a comma after each line but the
            # last.
            text = lines.strip().removeprefix(b"[").removesuffix(b"]").removesuffix(b",")
            yield from json.loads(b"[" + text + b"]")
        elif len(rest) > _CHUNK_BYTES:
            msg = "a long line"
            raise ValueError(msg)


def _add(run_map: RunMap, found: dict[str, Any], files: Sequence[tuple[int, int] | None]) -> bool:
    """Add a range to a map; return False if the map is full."""
    length, offset = found["length"], found.get("offset")
    if found["zero"] is True:
        return run_map.add(length, ZEROS)
    file = files[found["depth"]] if found["depth"] >= 0 else None
    if found["data"] is not True or found.get("compressed") or offset is None or file is None:
        return run_map.add(length, UNKNOWN)
    number, size = file
    # The part past the end of the file reads as zeros now.  Leave this part to QEMU, because
    # another program could make the file longer, in spite of the locks on the file.
    present = min(length, max(0, size - offset))
    if offset < 0 or not present:
        return run_map.add(length, UNKNOWN)
    is_added = run_map.add(present, number, offset)
    if present < length and is_added:
        is_added = run_map.add(length - present, UNKNOWN)
    return is_added
