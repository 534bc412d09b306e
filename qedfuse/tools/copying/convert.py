"""Copying a disk into a file of another format, or a chain into one image."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, cast

from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import UsageError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.newfile import NewFile
from qedfuse.hostio.regular import length_of, open_raw, status_of
from qedfuse.hostio.replacedfile import lock_replaced_file
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import probe_format
from qedfuse.tools.common.newbacking import refuse_backing_loop
from qedfuse.tools.common.pipe import is_stream, open_stream
from qedfuse.tools.copying.compare import verify_copy
from qedfuse.tools.copying.diskcopy import DiskCopy
from qedfuse.tools.copying.foreignimage import foreign_image
from qedfuse.tools.copying.imagespec import ImageSpec, open_new_base, qed_target
from qedfuse.tools.copying.streamcopy import copy_stream
from qedfuse.tools.source.source import open_source
from qedfuse.tools.target.qedtarget import ExistingQedTarget
from qedfuse.tools.target.rawtarget import ExistingRawTarget, NewRawTarget, StreamTarget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Literal

    from qedfuse.tools.common.pipe import Stream
    from qedfuse.tools.source.source import Source
    from qedfuse.tools.target.target import Target

    Progress = Callable[[int, int], None]

DEFAULT_STREAMS: Final = 4
MAX_STREAMS: Final = 16


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a copy came to; all in bytes.

    Attributes:
        size: Size of the disk.
        file_bytes: Length of the new file; 0 for a pipe.
        data_bytes: How much of the disk was written as data.
    """

    size: int
    file_bytes: int
    data_bytes: int


async def convert(
    source_path: str,
    target_path: str,
    spec: ImageSpec | None = None,
    *,
    source_format: Literal["auto", "raw", "qed"] = "auto",
    into_existing: bool = False,
    overwrite: bool = False,
    compare: bool = False,
    durable: bool = True,
    streams: int = DEFAULT_STREAMS,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Copy a disk; until the copy is complete there is nothing under its name, or the old file.

    Args:
        source_path: A QED image, a raw file or device, or a pipe (``-``: standard input).
        target_path: The new file, or a pipe for raw content (``-``: standard output).
        spec: What the new file is to be.
        source_format: What the source is.
        into_existing: Write into a file, image or device that is there.
        overwrite: Replace a file that is there.
        compare: Read both back before the copy counts as complete.
        durable: Have the copy on the host's disk before it counts as complete.  An image
            that is written into is made durable in any case.
        streams: How many pieces may be under way at once, 1 to 16.
        options: How to open the source.
        progress: Called with the bytes of the disk that are done, and how many it has.

    Raises:
        UsageError: What was asked for makes no sense.
        ImageInUseError: Somebody has the old file open, or has put another one there
            meanwhile.
        QedError: The source cannot be read, or the target cannot be made.
    """
    spec = spec or ImageSpec()
    work = _Work(target_path, spec, streams, options or OpenOptions(), progress)
    work.compare, work.durable = compare, durable
    async with AsyncExitStack() as stack:
        if is_stream(source_path):
            if source_format == "qed" or spec.backing is not None or compare or into_existing:
                msg = f"{printable(source_path)}: a pipe: expected raw content and a new file"
                raise UsageError(msg)
            work.raw_pipe = source_format == "raw"
            work.pipe = await open_stream(source_path, os.O_RDONLY)
            stack.callback(work.pipe.close)
        else:
            work.source = await stack.enter_async_context(
                open_source(source_path, source_format, work.options)
            )
            work.refuse_itself(work.source)
        if is_stream(target_path):
            return await work.into_pipe()
        if into_existing and work.source is not None:
            return await work.into_existing(work.source)
        return await work.into_new(overwrite=overwrite)


class _Work:
    """One conversion, its source open."""

    def __init__(
        self,
        path: str,
        spec: ImageSpec,
        streams: int,
        options: OpenOptions,
        progress: Progress | None,
    ) -> None:
        self.path = path
        self.name = printable(path)
        self.spec = spec
        self.streams = streams
        self.options = options
        self.progress = progress
        self.compare = False
        self.durable = True
        self.source: Source | None = None
        self.pipe: Stream | None = None
        self.raw_pipe = False

    def refuse_itself(self, source: Source) -> None:
        """Refuse to write over what is being read.

        Raises:
            UsageError: The target is the source, or one of its bases.
        """
        try:
            there = os.stat(self.path)  # noqa: PTH116  a name, not a Path
        except OSError:
            return
        for depth, info in enumerate(source.files()):
            if os.path.samestat(there, info):
                found = "a base of the source" if depth else "the source itself"
                msg = f"{self.name}: target: found {found}, expected another file"
                raise UsageError(msg)

    async def copy(self, target: Target, base: Source | None = None) -> tuple[int, int]:
        """Copy everything; give the size of the disk and the bytes written as data."""
        sparse = self.spec.sparse_size
        sends: Literal["and waits", "on"] | None = "and waits" if self.durable else "on"
        if self.spec.format not in {"raw", "qed"}:
            sends = None  # qemu-img reads it right away
        if self.pipe is not None:
            return await copy_stream(
                self.pipe, target, sparse_size=sparse, raw=self.raw_pipe, progress=self.progress
            )
        source = cast("Source", self.source)  # one of them is there
        copy = DiskCopy(
            source,
            target,
            base=base,
            sparse_size=sparse,
            sends=sends,
            progress=self.progress,
        )
        await copy.run(self.streams)
        return source.size, copy.data_bytes

    async def into_pipe(self) -> ConvertResult:
        """Write raw content to a pipe."""
        if self.spec.format != "raw" or self.compare:
            msg = f"{self.name}: a pipe: expected -O raw, and nothing to read back"
            raise UsageError(msg)
        stream = await open_stream(self.path, os.O_WRONLY)
        with closing(stream):
            size, data = await self.copy(StreamTarget(stream))
        return ConvertResult(size, 0, data)

    async def into_existing(self, source: Source) -> ConvertResult:
        """Write over the content of a file, an image or a device."""
        if self.spec.backing is not None or self.spec.format not in {"raw", "qed"}:
            msg = f"{self.name}: an existing file: expected -O raw or -O qed, and no -B"
            raise UsageError(msg)
        if self.spec.format == "qed":
            from qedfuse.check.inspector import inspect_image  # noqa: PLC0415  takes a while
            from qedfuse.disk.opening import open_disk  # noqa: PLC0415

            options = replace(self.options, writable=True, force_share=False)
            async with open_disk(self.path, options, inspector=inspect_image) as disk:
                self._check_room(source, disk.size)
                size, data = await self.copy(ExistingQedTarget(disk))
                length = disk.fstat().st_size
        else:
            if probe_format(self.path) == "qed":
                msg = f"{self.name}: found a QED image, expected raw content (-O qed writes to it)"
                raise UsageError(msg)
            fd = open_raw(self.path, os.O_RDWR)
            try:
                lock_image(fd, LockMode.WRITE, self.name)
                length = length_of(fd, self.name)
                self._check_room(source, length)
                size, data = await self.copy(ExistingRawTarget(fd, self.name, durable=self.durable))
            finally:
                os.close(fd)
        if self.compare:
            await self._verify(source, self.path, self.spec.format)
        return ConvertResult(size, length, data)

    def _check_room(self, source: Source, size: int) -> None:
        """Refuse a target that is too small."""
        if size < source.size:
            msg = f"{self.name}: size: found {size}, expected at least {source.size}"
            raise UsageError(msg)

    async def into_new(self, *, overwrite: bool) -> ConvertResult:
        """Make a new file."""
        spec = self.spec
        if spec.backing is not None and spec.format != "qed":
            msg = (
                f"{self.name}: -B: found format {spec.format}, expected qed (qemu-img convert "
                "-B makes overlays of other formats)"
            )
            raise UsageError(msg)
        if spec.backing is not None:
            refuse_backing_loop(self.path, spec.backing, self.options.backing.working_directory)
        with ExitStack() as stack:
            old = lock_replaced_file(self.path, stack, overwrite=overwrite, in_place=True)
            new = stack.enter_context(NewFile(self.path, old=old, overwrite=overwrite))
            if spec.format not in {"raw", "qed"}:
                size, data = await self._through_qemu(new)
            else:
                fd = os.open(new.path, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                async with self._new_target(fd) as (target, base):
                    size, data = await self.copy(target, base)
                if self.compare and self.source is not None:
                    await self._verify(self.source, new.path, spec.format)
            new.commit(durable=self.durable)
        return ConvertResult(size, status_of(self.path, self.name).st_size, data)

    @asynccontextmanager
    async def _new_target(self, fd: int) -> AsyncIterator[tuple[Target, Source | None]]:
        """Prepare an empty file; open the base as well."""
        spec = self.spec
        if spec.format == "raw":
            yield NewRawTarget(fd, self.name, spec.sparse_size), None
            return
        async with AsyncExitStack() as stack:
            base = None
            if spec.backing is not None:
                base = await stack.enter_async_context(open_new_base(self.path, spec, self.options))
            yield qed_target(fd, self.name, spec, self.source, base), base

    async def _through_qemu(self, new: NewFile) -> tuple[int, int]:
        """Make a raw file on the way, and have qemu-img make the image of it."""
        spec = self.spec
        if self.compare:
            msg = f"{self.name}: --compare: found format {spec.format}, expected raw or qed"
            raise UsageError(msg)
        options = spec.foreign_options
        async with foreign_image(self.path, new.path, spec.format, options) as fd:
            return await self.copy(NewRawTarget(fd, self.name, spec.sparse_size))

    async def _verify(self, source: Source, path: str, found: str) -> None:
        """Compare what was made with the source."""
        options = replace(self.options, force_share=True)
        if self.spec.backing is not None:
            directory = options.backing.working_directory
            base = backing_path(self.path, self.spec.backing, directory)
            options = replace(options, backing=replace(options.backing, trusted=base))
        async with open_source(path, "raw" if found == "raw" else "qed", options) as copy:
            await verify_copy(source, copy, self.name)
