"""Images of other formats, made by qemu-img of a raw file that lives as long as it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, UsageError, cannot_open
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_PROGRAM: Final = "qemu-img"


@asynccontextmanager
async def foreign_image(
    path: str, temporary: str, wanted: str, options: Sequence[str]
) -> AsyncIterator[int]:
    """Give an empty file to write a raw disk to; make an image of it at the end of the block.

    Args:
        path: What the image will be called.
        temporary: Where it is to be put.
        wanted: Its format, as qemu-img calls it.
        options: What qemu-img is given with ``-o``.

    Raises:
        UsageError: qemu-img is not there, or does not know the format.
        HostError: It failed.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        msg = f"{printable(path)}: format {printable(wanted)}: expected qemu-img to be installed"
        raise UsageError(msg)
    await _refuse_unknown(program, path, wanted)
    directory, name = os.path.split(path)
    start = os.fsdecode(os.fsencode(name)[:200])  # a name has at most 255 bytes
    try:
        # Some formats store the name of the file in it; so it has the right one already.
        place = tempfile.mkdtemp(prefix=f".{start}.", suffix=".part", dir=directory or ".")
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        raw, image = os.path.join(place, "raw"), os.path.join(place, "image", name)  # noqa: PTH118
        os.mkdir(os.path.dirname(image))  # noqa: PTH102, PTH120  names, not Paths
        fd = os.open(raw, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
        words = [word for option in options for word in ("-o", option)]
        command = [program, "convert", "-f", "raw", "-O", wanted, *words, raw, image]
        await _run(command, path)
        os.replace(image, temporary)  # noqa: PTH105
    finally:
        shutil.rmtree(place, ignore_errors=True)


async def _refuse_unknown(program: str, path: str, wanted: str) -> None:
    """Look at the list of formats before the work, which may take long, is done."""
    done = await trio.run_process([program, "--help"], capture_stdout=True, check=False)
    text = done.stdout.decode(errors="replace")
    known = text.partition("Supported formats:")[2].split("\n")[0].split()
    if wanted not in known:
        found = printable(wanted)
        msg = f"{printable(path)}: format: found {found}, expected one of {' '.join(known)}"
        raise UsageError(msg)


async def _run(command: list[str], path: str) -> None:
    """Run qemu-img; a failure becomes one line.

    Raises:
        HostError: It failed.
    """
    try:
        await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        msg = f"{printable(path)}: qemu-img: {printable(said[-1])}"
        raise HostError(msg) from error
