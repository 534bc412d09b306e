"""How much space a copy of a disk would need: exactly what `convert` would make of it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.newheader import new_header
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import SECTOR
from qedfuse.text import printable
from qedfuse.tools.copying.convert import DEFAULT_STREAMS
from qedfuse.tools.copying.diskcopy import DiskCopy
from qedfuse.tools.copying.imagespec import ImageSpec, open_new_base, qed_target
from qedfuse.tools.source.source import open_source
from qedfuse.tools.target.rawtarget import NewRawTarget

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    Progress = Callable[[int, int], None]

_NOWHERE: Final = -1


@dataclass(frozen=True, slots=True)
class Measurement:
    """Space for a disk; both in bytes.

    Attributes:
        required: What a copy takes.  For QED that is the length of the file.
        fully_allocated: What it takes once all of the disk has been written to.
    """

    required: int
    fully_allocated: int


def measure_empty(size: int, spec: ImageSpec) -> Measurement:
    """Tell what a new disk of ``size`` bytes needs.

    Raises:
        UsageError: The size or the geometry makes no sense.
    """
    _check_format(spec)
    if spec.format == "raw":
        size = -(-size // SECTOR) * SECTOR
        return Measurement(0, size)
    header = new_header(
        size, spec.cluster_size, spec.table_size, spec.backing, backing_is_raw=False
    )
    most = header.geometry.bound(header.header_end, header.image_size)
    return Measurement(header.l1_end, most)


async def measure(
    path: str,
    spec: ImageSpec,
    *,
    source_format: Literal["auto", "raw", "qed"] = "auto",
    image: str = "",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Tell what a copy of a disk needs, by reading it: what is zeros takes no space.

    Args:
        path: A QED image, a raw file or a block device.
        spec: What the copy is to be, ``raw`` or ``qed``.
        source_format: What the source is.
        image: The name of the copy, where a relative name of its base begins.
        options: How to open the source.
        progress: Called with the bytes of the disk that are done, and how many it has.

    Raises:
        UsageError: The geometry makes no sense, or cannot hold the disk.
        QedError: The source cannot be read.
    """
    _check_format(spec)
    options = options or OpenOptions()
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(open_source(path, source_format, options))
        name = printable(path)
        if spec.format == "raw":
            raw = NewRawTarget(_NOWHERE, name, spec.sparse_size)
            copy = DiskCopy(source, raw, sparse_size=spec.sparse_size, progress=progress)
            await copy.run(DEFAULT_STREAMS)
            return Measurement(copy.data_bytes, source.size)
        base = None
        if spec.backing is not None:
            base = await stack.enter_async_context(open_new_base(image, spec, options))
        target = qed_target(_NOWHERE, name, spec, source, base)
        copy = DiskCopy(source, target, base=base, sparse_size=spec.sparse_size, progress=progress)
        await copy.run(DEFAULT_STREAMS)
        empty = measure_empty(source.size, spec)
        return Measurement(target.end, empty.fully_allocated)


def _check_format(spec: ImageSpec) -> None:
    """Refuse formats whose files are not made here."""
    if spec.format not in {"raw", "qed"}:
        found = printable(spec.format)
        msg = f"-O: found {found}, expected raw or qed (qemu-img measure knows some others)"
        raise UsageError(msg)
