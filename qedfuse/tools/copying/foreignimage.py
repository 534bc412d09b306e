"""Making images of foreign formats: qemu-img converts a temporary raw file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, UsageError
from qedfuse.text import printable
from qedfuse.util.exitstatus import describe_exit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

_PROGRAM: Final = "qemu-img"
_TRIAL_DISK_BYTES: Final = 1 << 20
"""Bytes of the disk of the trial image; every format of qemu-img allows this size."""
_SPARSE_UNIT_BYTES: Final = 512
"""Unit of the sizes that ``-S`` of qemu-img accepts."""
_MAX_SPARSE_BYTES: Final = 16 << 20
"""Maximum size that ``-S`` of qemu-img accepts."""

_MAX_NAME_PREFIX_BYTES: Final = 200
"""Maximum bytes of the image's name in the temporary directory's name, because of NAME_MAX."""

_DATA_FILE: Final = re.compile(r"(?:^|,)(?:no)?data_file(?:=|,|$)")
"""The option of qcow2 for a separate file with the data.  Without a value the file is ``on`` or
``off``."""


@asynccontextmanager
async def foreign_image(
    path: str, temporary: str, wanted: str, options: Sequence[str], sparse_size: int
) -> AsyncIterator[int]:
    """Yield the descriptor of an empty file, which the caller must fill with a raw disk.

    At the end of the block, qemu-img converts the raw file into the image.  If the block raises, no
    image is made.

    Args:
        path: Final name of the image.
        temporary: Path of an existing temporary file, which the complete image replaces.  The image
            has the mode of this file from then on.
        wanted: Format of the image, as qemu-img calls the format.
        options: Arguments for ``-o`` of qemu-img.
        sparse_size: Minimum length in bytes of a run of zeros that is not written as data; 0
            writes all zeros as data.

    Raises:
        UsageError: qemu-img is not installed, does not make the format, or would make no file or
            several files with these options.
        HostError: qemu-img refused the options or failed, or the host refused a system call.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        msg = f"{printable(path)}: format {printable(wanted)}: expected qemu-img to be installed"
        raise UsageError(msg)
    words = [word for option in options for word in ("-o", option)]
    directory, name = os.path.split(path)
    prefix = os.fsdecode(os.fsencode(name)[:_MAX_NAME_PREFIX_BYTES])
    with _host_errors(path, "cannot open"):
        work_directory = tempfile.mkdtemp(
            prefix=f".{prefix}.", suffix=".part", dir=directory or "."
        )
    try:
        # Without "./", qemu-img would read the beginning of "a:b" as a protocol, and a path that
        # begins with "-" as an option.
        raw = os.path.join(".", work_directory, "raw")  # noqa: PTH118  names, not Paths
        # Some formats store the file name in the image, so it must be the final one.  The image has
        # a directory of its own, so that `_try_options` can count the files that qemu-img makes.
        image = os.path.join(".", work_directory, "image", name)  # noqa: PTH118
        with _host_errors(path, "cannot make a temporary directory"):
            os.mkdir(os.path.dirname(image))  # noqa: PTH102, PTH120
        await _try_options(program, path, wanted, words, image)
        with _host_errors(path, "cannot make a temporary file"):
            fd = os.open(raw, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
        sparse = ["-S", str(_qemu_sparse_size(sparse_size))]
        reason = await _run(
            [program, "convert", "-f", "raw", "-O", wanted, *sparse, *words, raw, image], image
        )
        if reason is not None:
            msg = f"{printable(path)}: qemu-img: {reason}"
            raise HostError(msg)
        with _host_errors(path, "cannot rename"):
            # qemu-img makes its file readable by others, but the file at the final name may be
            # private.  Only the directory, with mode 0700, has protected the image until now.
            os.chmod(image, os.stat(temporary).st_mode & 0o7777)  # noqa: PTH101, PTH116
            os.replace(image, temporary)  # noqa: PTH105
    finally:
        shutil.rmtree(work_directory, ignore_errors=True)


async def _try_options(
    program: str, path: str, wanted: str, words: Sequence[str], image: str
) -> None:
    """Create and remove a small image, so that a bad option fails before the copy, not after it.

    The messages of qemu-img are not interpreted, because they differ between versions.
    """
    create = [program, "create", "-q", "-f", wanted]
    name = printable(path)
    reason = await _run([*create, "-o", "help"], image)
    if reason is not None:
        found = printable(wanted)
        msg = f"{name}: format: found {found}, expected one that qemu-img makes ({reason})"
        raise UsageError(msg)
    options = printable(" ".join(words[1::2]))
    if any(_DATA_FILE.search(word.replace(",,", "")) for word in words[1::2]):
        # qemu-img would overwrite the data file, which may be any file of the user, even before the
        # copy is complete.  And it would not make the data durable.
        msg = f"{name}: -o {options}: found a file of its own for the data, expected one file"
        raise UsageError(msg)
    reason = await _run([*create, *words, image, str(_TRIAL_DISK_BYTES)], image)
    if reason is not None:
        msg = f"{name}: qemu-img: {reason}"
        raise HostError(msg)
    directory, wanted_name = os.path.split(image)
    with _host_errors(path, "cannot read a temporary directory"):
        made = os.listdir(directory)  # noqa: PTH208  names, not Paths
    if made != [wanted_name]:
        # Only a single file can be moved to the final name.  But qemu-img makes several files for a
        # VMDK of several extents, for example.
        found = f"{len(made)} files" if made else "no file"
        msg = f"{name}: -o {options}: found {found} made by qemu-img, expected one file"
        raise UsageError(msg)
    with _host_errors(path, "cannot remove a temporary file"):
        os.unlink(image)  # noqa: PTH108  a name, not a Path


def _qemu_sparse_size(sparse_size: int) -> int:
    """Return a size for ``-S`` that qemu-img accepts: rounded up to sectors, at most 16 MiB."""
    whole = -(-sparse_size // _SPARSE_UNIT_BYTES) * _SPARSE_UNIT_BYTES
    return min(whole, _MAX_SPARSE_BYTES)


@contextmanager
def _host_errors(name: str, action: str) -> Iterator[None]:
    """Turn an OSError in the ``with`` block into a HostError; ``name`` need not be printable."""
    try:
        yield
    except OSError as error:
        raise HostError.from_os(error, printable(name), action) from error


async def _run(command: list[str], image: str) -> str | None:
    """Run qemu-img; return None if it succeeded, else the reason in one line, without ``image``."""
    with _host_errors(command[0], "cannot run"):
        completed = await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False
        )
    if completed.returncode == 0:
        return None
    lines = completed.stderr.decode(errors="replace").split("\n")
    errors = [line.strip() for line in lines if line.strip() and "warning:" not in line]
    if completed.returncode < 0 or not errors:
        return describe_exit(completed.returncode)
    reason = errors[0]
    return printable(reason.removeprefix(f"{_PROGRAM}: ").replace(f"{image}: ", ""))
