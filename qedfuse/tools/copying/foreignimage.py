"""Making images of other formats: qemu-img converts a temporary raw file."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, UsageError, cannot_open
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_PROGRAM: Final = "qemu-img"
_TRIAL_DISK_BYTES: Final = 1 << 20
"""Size of the trial image's disk; every format allows it."""

_MAX_NAME_PREFIX_BYTES: Final = 200
"""Bytes of the image's name in the temporary directory's; a name has at most 255."""


@asynccontextmanager
async def foreign_image(
    path: str, temporary: str, wanted: str, options: Sequence[str]
) -> AsyncIterator[int]:
    """Yield an empty file for a raw disk; convert it into an image at the end of the block.

    Args:
        path: Final name of the image.
        temporary: Path at which the image is put in the end; it is replaced.
        wanted: Its format, as qemu-img calls it.
        options: Arguments for ``-o`` of qemu-img.

    Raises:
        UsageError: qemu-img is not installed, does not make the format, or would not make
            exactly one file with these options.
        HostError: qemu-img failed.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        msg = f"{printable(path)}: format {printable(wanted)}: expected qemu-img to be installed"
        raise UsageError(msg)
    words = [word for option in options for word in ("-o", option)]
    directory, name = os.path.split(path)
    start = os.fsdecode(os.fsencode(name)[:_MAX_NAME_PREFIX_BYTES])
    try:
        work_directory = tempfile.mkdtemp(prefix=f".{start}.", suffix=".part", dir=directory or ".")
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        # "./" before a relative name: for qemu-img "a:b/c" has a protocol, and "-a" is an option.
        raw = os.path.join(".", work_directory, "raw")  # noqa: PTH118  names, not Paths
        # Its final name from the beginning: some formats store the name of the file in it.
        image = os.path.join(".", work_directory, "image", name)  # noqa: PTH118
        os.mkdir(os.path.dirname(image))  # noqa: PTH102, PTH120
        await _try_options(program, path, wanted, words, image)
        fd = os.open(raw, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
        reason = await _run(
            [program, "convert", "-f", "raw", "-O", wanted, *words, raw, image], image
        )
        if reason is not None:
            msg = f"{printable(path)}: qemu-img: {reason}"
            raise HostError(msg)
        os.replace(image, temporary)  # noqa: PTH105
    finally:
        shutil.rmtree(work_directory, ignore_errors=True)


async def _try_options(
    program: str, path: str, wanted: str, words: Sequence[str], image: str
) -> None:
    """Create and remove a small image, so that a bad option fails before the copy, not after it.

    The exit status and the directory decide; qemu-img's text differs between its versions and
    is only quoted.

    Args:
        program: qemu-img.
        path: Final name of the image, for messages.
        wanted: Its format.
        words: The options, as arguments.
        image: Name for the trial image, in an empty directory.

    Raises:
        UsageError: qemu-img cannot make the format, or would not make one file.
        HostError: qemu-img refuses the options.
    """
    create = [program, "create", "-q", "-f", wanted]
    name = printable(path)
    reason = await _run([*create, "-o", "help"], image)
    if reason is not None:
        found = printable(wanted)
        msg = f"{name}: format: found {found}, expected one that qemu-img makes ({reason})"
        raise UsageError(msg)
    if any("data_file=" in word for word in words):
        return  # a file named by the user must not be written before the copy has succeeded
    reason = await _run([*create, *words, image, str(_TRIAL_DISK_BYTES)], image)
    if reason is not None:
        msg = f"{name}: qemu-img: {reason}"
        raise HostError(msg)
    directory, wanted_name = os.path.split(image)
    made = os.listdir(directory)  # noqa: PTH208  names, not Paths
    if made != [wanted_name]:
        # A VMDK of several extents, for example: the others would be lost.  None: "-o help".
        options = printable(" ".join(words[1::2]))
        found = f"{len(made)} files" if made else "none"
        msg = f"{name}: -o {options}: found that qemu-img makes {found}, expected one file"
        raise UsageError(msg)
    os.unlink(image)  # noqa: PTH108  a name, not a Path


async def _run(command: list[str], image: str) -> str | None:
    """Run qemu-img; return None if it succeeded, else the reason in one printable line.

    Args:
        command: qemu-img and its arguments.
        image: Temporary name of the image, which is removed from the reason.
    """
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().split("\n")
    reason = next((line for line in lines if "warning:" not in line), "no reason given")
    return printable(reason.removeprefix(f"{_PROGRAM}: ").replace(f"{image}: ", ""))
