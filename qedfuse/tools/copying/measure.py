"""The space that a copy of a disk needs, computed by a copy that writes nothing."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.newheader import new_header
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import SECTOR
from qedfuse.text import printable
from qedfuse.tools.copying.diskcopy import DEFAULT_STREAMS, DiskCopy
from qedfuse.tools.copying.imagespec import ImageSpec, open_new_base, qed_target
from qedfuse.tools.source.source import open_source
from qedfuse.tools.target.rawtarget import NewRawTarget

if TYPE_CHECKING:
    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.util.backgroundtasks import Progress


_NO_FILE: Final = -1
"""Passed as the descriptor of a target that must write nothing."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Space for a disk, in bytes.

    Attributes:
        required: For QED the length of the new file; for raw the bytes outside holes.
        fully_allocated: Space for the file after every byte of the disk has been written.
    """

    required: int
    fully_allocated: int


def measure_empty(size: int, spec: ImageSpec) -> Measurement:
    """Return the space for a new disk of ``size`` bytes to which nothing has been written yet.

    Raises:
        UsageError: The size, the geometry or the format is invalid, or the name of the backing file
            cannot be stored.
    """
    _check_format(spec)
    if spec.format == "raw":
        size = -(-size // SECTOR) * SECTOR
        return Measurement(0, size)
    header = new_header(
        size, spec.cluster_size, spec.table_size, spec.backing, backing_is_raw=False
    )
    maximum = header.geometry.bound(header.header_end, header.image_size)
    return Measurement(header.l1_end, maximum)


async def measure(
    path: str,
    spec: ImageSpec,
    *,
    source_format: FormatChoice = "auto",
    image: str = "",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Return the space for a copy of a disk; read the disk to find zeros, which take no space.

    Args:
        path: An image, a raw file or a block device; or a URL.
        spec: Format (``raw`` or ``qed``) and geometry of the copy.
        source_format: Format of the source; ``auto`` detects the format from the first bytes.
        image: Path that the copy would have; the name of its backing file is relative to the
            directory of this path.
        options: How to open the source and the backing file; None for the defaults.
        progress: Called with the guest offset that was reached, and the size of the disk.

    Raises:
        UsageError: The format or the geometry is invalid, the name of the backing file cannot be
            stored, or `open_source` refuses the source.
        BackingError: The backing file of the copy cannot be used.
        QedError: The source cannot be read.
    """
    _check_format(spec)
    options = options or OpenOptions()
    async with AsyncExitStack() as stack:
        whole = spec.backing is not None
        source = await stack.enter_async_context(
            open_source(path, source_format, options, whole_sectors=whole)
        )
        name = source.name
        if spec.format == "raw":
            raw = NewRawTarget(_NO_FILE, name, spec.sparse_size)
            copy = DiskCopy(source, raw, sparse_size=spec.sparse_size, progress=progress)
            await copy.run(DEFAULT_STREAMS)
            return Measurement(copy.data_bytes, source.size)
        base = None
        if spec.backing is not None:
            base = await stack.enter_async_context(open_new_base(image, spec, options))
        target = qed_target(_NO_FILE, name, spec, source, base)
        copy = DiskCopy(source, target, base=base, sparse_size=spec.sparse_size, progress=progress)
        await copy.run(DEFAULT_STREAMS)
        empty = measure_empty(source.size, spec)
        return Measurement(target.end, empty.fully_allocated)


def _check_format(spec: ImageSpec) -> None:
    """Raise UsageError if the format is not supported, or is ``raw`` with a backing file."""
    if spec.format not in {"raw", "qed"}:
        found = printable(spec.format)
        msg = f"-O: found {found}, expected raw or qed (qemu-img measure supports others)"
        raise UsageError(msg)
    if spec.format == "raw" and spec.backing is not None:
        msg = f"backing file {printable(spec.backing)}: found -O raw, expected -O qed"
        raise UsageError(msg)
